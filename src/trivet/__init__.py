"""Trivet: design, train, serve and let act a small model that thinks."""

__version__ = "0.1.0"
