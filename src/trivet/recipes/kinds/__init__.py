"""The kinds of stages: settings, what they read, and what they do. One file each."""
