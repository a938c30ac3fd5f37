"""Conversations as token ids, and back.

`chat` renders and parses, `split` takes a stream apart, `syntax` is the table of tool-call syntaxes, `template`
does it all with a checkpoint's own template, `builtin` has Trivet's own tokenizers.
"""

from __future__ import annotations

from trivet.chat.builtin import bpe_chat, tiny_chat
from trivet.chat.chat import SOFT_SWITCH, Chat, Markers, Rendered

__all__ = ["SOFT_SWITCH", "Chat", "Markers", "Rendered", "bpe_chat", "tiny_chat"]
