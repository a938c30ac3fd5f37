"""What a model wrote, taken apart while it streams: thinking, text and tool calls.

A tag is one token of the vocabulary wherever it can be: then the same characters, typed out in code that the
model writes, are text. Where the vocabulary has no such token (MiniMax-M1's <tool_calls>) the tag is found in
the text, however its tokens cut it: what may become a tag is held back until it is one or can't be.

    a tag where it means nothing      is text
    a call that is never closed       is text, unless its syntax closes it with the message
    a thought inside a call           is part of the call; the end of the thought around it ends the call
    half a character                  waits for its other bytes; at the end it is shown as it is
    a stop string                     ends the text before it, wherever it stands between tags; what may become one
                                      is held back
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Literal

from trivet.chat.syntax import read_calls
from trivet.messages import Event, Message, ToolCall, ToolSpec

if TYPE_CHECKING:
    from trivet.chat.chat import Chat

Role = Literal["think_open", "think_close", "tool_open", "tool_close", "end"]


def longest_start(text: str, wanted: Collection[str]) -> int:
    """How many characters at the end of a text may become one of `wanted`."""
    longest = max(map(len, wanted), default=1) - 1
    ends = (text[len(text) - n :] for n in range(min(longest, len(text)), 0, -1))
    return next((len(end) for end in ends if any(whole.startswith(end) for whole in wanted)), 0)


class Splitter:
    """Tokens in, events out; the texts of one kind join to the field of `message()`, in any chunking.

    thinking: the prompt already opened the thinking block.
    tools: what was offered; see `read_calls`. stops: of several the one that is complete first, and then the longest.
    """

    def __init__(self, chat: Chat, thinking: bool, tools: Sequence[ToolSpec] = (), stops: Sequence[str] = ()) -> None:
        self.chat, self.thinking, self.tools, self.stops = chat, thinking, tools, stops
        self._stopped = False
        self._waits = ""  # text that may become a stop string
        self.reasoning: str | None = "" if thinking else None
        self.content = ""
        self.calls: list[ToolCall] = []
        self._block: str | None = None  # text since an open tool tag
        self._opened = ""  # the tag itself; "" where a call began without one
        self._pending: list[int] = []  # ids whose bytes may not be whole characters yet
        self._before: list[int] = []  # the ids before them: some decoders drop a space at the beginning
        self._held = ""  # text that may become a tag
        self._gaps = {"reasoning": "", "text": ""}  # line breaks that are shown only if more follows

    def push(self, ids: Iterable[int]) -> list[Event]:
        return [event for token in ids for event in self._token(token)]

    def finish(self) -> list[Event]:
        """End of the completion."""
        events = self._until_stop(self._decoded(final=True), final=True)
        closed = self._block is not None and not self.chat.markers.tool_close
        return events + (self._close() if closed else self._drop())

    def message(self) -> Message:
        return Message("assistant", self.content, self.reasoning, tuple(self.calls))

    def _token(self, token: int) -> list[Event]:
        role = self.chat.tag_ids.get(token)
        if role is None:
            self._pending.append(token)
            return self._until_stop(self._decoded(final=False), final=False)
        events = self._until_stop(self._decoded(final=True), final=True)
        self._before = [token]
        return events if self._stopped else events + self._tag(role, self.chat.decode([token]))

    def _decoded(self, final: bool) -> str:
        """The pending ids as text, or "" while a character's bytes are still arriving."""
        before = len(self.chat.decode(self._before)) if self._pending else 0
        text = self.chat.decode([*self._before, *self._pending])[before:] if self._pending else ""
        if not final and (not text or text.endswith("\ufffd")):
            return ""
        if self._pending:
            self._before, self._pending = self._pending, []
        return text

    def _until_stop(self, text: str, final: bool) -> list[Event]:
        if self._stopped or not self.stops:
            return [] if self._stopped else self._text(text, final)
        text, self._waits = self._waits + text, ""
        found = [(at + len(stop), at) for stop in self.stops if (at := text.find(stop)) >= 0]
        if found:
            self._stopped = True
            return self._text(text[: min(found)[1]], final=True)
        keep = 0 if final else longest_start(text, self.stops)
        self._waits = text[len(text) - keep :]
        return self._text(text[: len(text) - keep], final)

    def _text(self, text: str, final: bool) -> list[Event]:
        """Text, in which tags may be written out."""
        if not (self.chat.starts or self.chat.text_roles):
            return self._write(text)
        text, self._held = self._held + text, ""
        events: list[Event] = []
        if self._at_start:
            begun = text.lstrip()
            for start, role in self.chat.starts.items():
                if role == "tool_open" and not self.tools:
                    continue
                if begun.startswith(start):
                    # A thought's tag goes; a call without a tag begins with itself.
                    tag = start if role == "think_open" else ""
                    events, text = self._tag(role, tag), begun[len(tag) :] if tag else text
                    break
                if start.startswith(begun) and not final:
                    self._held = text
                    return []
        while found := self.chat.text_tags.search(text):
            events += self._write(text[: found.start()])
            events += self._tag(self.chat.text_roles[found[0]], found[0])
            text = text[found.end() :]
        keep = 0 if final else longest_start(text, self.chat.text_roles)
        self._held = text[len(text) - keep :]
        return events + self._write(text[: len(text) - keep])

    @property
    def _at_start(self) -> bool:
        """No answer has begun: thoughts may have been."""
        return not (self.thinking or self.content or self.calls) and self._block is None

    def _tag(self, role: Role, tag: str) -> list[Event]:
        if role == "end":
            return self.finish()
        if role == "think_close" and self.thinking:
            events = self._drop()
            self.thinking = False
            return events
        if self._block is not None:
            if role == "tool_close":
                return self._close()
            self._block += tag
            return []
        if role == "think_open" and not self.thinking:
            self.thinking, self.reasoning = True, self.reasoning or ""
            return []
        if role == "tool_open":
            self._block, self._opened = "", tag
            return []
        return self._write(tag)

    def _close(self) -> list[Event]:
        block = self._block or ""
        calls = read_calls(self.chat.syntax, block, len(self.calls), self.tools)
        if not self._opened and any(call.error for call in calls):
            return self._drop()  # no tag said that this was a call: it is an answer in JSON
        self._block = None
        self.calls += calls
        return [Event("tool_call", call.text) for call in calls]

    def _drop(self) -> list[Event]:
        """A block that was none is text."""
        if self._block is None:
            return []
        text, self._block = self._opened + self._block, None
        return self._write(text)

    def _write(self, text: str) -> list[Event]:
        if self._block is not None:
            self._block += text
            return []
        kind: Literal["reasoning", "text"] = "reasoning" if self.thinking else "text"
        so_far = (self.reasoning or "") if self.thinking else self.content
        if self.chat.strips:
            text = self._gaps[kind] + text
            kept = text.rstrip("\n")
            self._gaps[kind] = text[len(kept) :]
            text = kept if so_far else kept.lstrip("\n")
        if not text:
            return []
        if self.thinking:
            self.reasoning = so_far + text
        else:
            self.content = so_far + text
        return [Event(kind, text)]
