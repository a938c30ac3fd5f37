"""Conversations as token ids, and back: a tokenizer, a chat template and the tags between them.

    render   messages -> ids, and which of them the assistant wrote (the loss mask)
    parse    ids the assistant wrote -> reasoning, text, tool calls; never raises
    splitter parse for a stream: the pieces of any chunking join to what parse gives

The template is jinja, rendered in a sandbox, with transformers' `{% generation %}` block around what
the assistant wrote. Three rules keep training and sampling the same:

* an assistant message that a model wrote is spliced in as its own ids, never tokenised again;
* every piece between tags is tokenised on its own, so neighbours can't merge across a boundary;
* only the template writes tags: a user who types `</think>` sends the plain characters.

Tags come from the tokenizer's files (`Markers`), each one token; no id is written down in code.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from trivet.chat.split import Role, Splitter
from trivet.chat.syntax import SYNTAXES, Name
from trivet.config import UserError, validate
from trivet.disk import write_atomic
from trivet.messages import Message, ToolCall, ToolSpec
from trivet.spec import Frozen

GENERATED, WRITTEN, PLAIN, TYPED, SPLICE, SPLICED = "\ue000\ue001\ue002\ue003\ue004\ue005"  # pairs of marks
MARKS = re.compile(f"([{GENERATED}{WRITTEN}{PLAIN}{TYPED}]|{SPLICE}\\d+{SPLICED})")

SOFT_SWITCH = re.compile(r"(?<!\S)/(no_)?think(?!\S)")  # Qwen3's, as a word of its own
Thinks = Literal["never", "can", "always"]


class Markers(Frozen):
    """The tags of a tokenizer, by role; "" where it has none. Kept in tokenizer_config.json under "trivet"."""

    think_open: str = "<think>"
    think_close: str = "</think>"
    tool_open: str = "<tool_call>"
    tool_close: str = "</tool_call>"
    end: str = "<end>"
    closing_message: str = "…"  # what the engine writes before think_close when the budget is spent
    continuing_message: str = "\nWait, "  # and instead of a think_close that comes too early
    tool_syntax: Name = "bare"  # what stands between the tool tags: see syntax.py
    transformers: bool = False  # the template is a checkpoint's own: see template.py
    single_turn: bool = False  # training showed one question a conversation, so a second one would be foreign to it


@dataclass(frozen=True)
class Rendered:
    """A conversation as ids; mask is True where the assistant wrote (and a loss belongs)."""

    ids: list[int]
    mask: list[bool]


class Chat:
    """A tokenizer with its template and markers. Raises UserError where a marker is not one token."""

    strips = False  # line breaks between a tag and its text are the template's, not the model's words

    def __init__(self, tokenizer: Tokenizer, template: str, markers: Markers) -> None:
        self.tokenizer, self.template = tokenizer, template
        self._literal = Tokenizer.from_str(tokenizer.to_str())
        self._literal.encode_special_tokens = True  # tags are plain characters to this one
        try:
            self._compiled = self.environment().from_string(template)
        except TemplateError as e:
            raise UserError(f"The chat template can't be read: {e}.") from None
        self.use(markers)

    def __reduce__(self) -> tuple[Any, ...]:
        """To be sent to another process: a compiled template can't be, so the chat is made again there."""
        return type(self), (self.tokenizer, self.template, self.markers)

    def use(self, markers: Markers) -> None:
        """Take these markers. Raises UserError where one is not in the vocabulary as it must be."""
        self.markers = markers
        self.think_open_id, self.think_close_id = self._one(markers.think_open), self._one(markers.think_close)
        self.tool_open_id, self.tool_close_id = self._one(markers.tool_open), self._one(markers.tool_close)
        self.end_id = self._one(markers.end)
        self.syntax = SYNTAXES[markers.tool_syntax]
        self._tags_in_text()
        closing = [*self.encode_text(markers.closing_message), self.think_close_id]
        self.closing_ids = closing if self.think_close_id >= 0 else []  # no tags: nothing to close

    @cached_property
    def continuing_ids(self) -> list[int]:
        """The continuing message. Raises UserError where the tokenizer can't write it."""
        return self.encode_text(self.markers.continuing_message)

    def environment(self) -> ImmutableSandboxedEnvironment:
        """What a template may do."""
        made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation])
        made.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
        return made

    def _tags_in_text(self) -> None:
        """Where a splitter finds tags: as ids, else in the text; a thought without a token only begins a message."""
        m = self.markers
        tags: dict[Role, str] = {"think_open": m.think_open, "think_close": m.think_close, "tool_open": m.tool_open,
                                 "tool_close": m.tool_close, "end": m.end}  # fmt: skip
        ids: dict[Role, int] = {"think_open": self.think_open_id, "think_close": self.think_close_id,
                                "tool_open": self.tool_open_id, "tool_close": self.tool_close_id, "end": self.end_id}  # fmt: skip
        self.tag_ids = {id: role for role, id in ids.items() if id >= 0}
        self.text_roles = {
            tags[role]: role for role, id in ids.items() if id < 0 and tags[role] and role != "think_open"
        }
        self.text_tags = re.compile("|".join(map(re.escape, self.text_roles)) or r"(?!)")
        self.starts: dict[str, Role] = {}
        if m.think_open and self.think_open_id < 0:
            self.starts[m.think_open] = "think_open"
        if self.syntax.start:
            self.starts[self.syntax.start] = "tool_open"

    # --- files -----------------------------------------------------------------------------------
    @classmethod
    def load(cls, directory: Path) -> Chat:
        """Read tokenizer.json and tokenizer_config.json. Raises UserError where they are missing or odd."""
        files = [Path(directory) / name for name in ("tokenizer.json", "tokenizer_config.json")]
        for file in files:
            if not file.is_file():
                raise UserError(f"{str(directory)!r} has no {file.name}, so its text can't be read.")
        try:
            tokenizer = Tokenizer.from_str(files[0].read_text())
            config = json.loads(files[1].read_text())
        except Exception as e:  # tokenizers raises bare Exception
            raise UserError(f"The tokenizer in {str(directory)!r} is damaged: {e}.") from None
        ours = config.get("trivet")
        if ours is None or (isinstance(ours, dict) and ours.get("transformers")):
            from trivet.chat.template import TemplateChat

            return TemplateChat.read(directory, tokenizer, config)
        if "chat_template" not in config:
            raise UserError(f"{files[1]} has no 'chat_template', so a conversation can't be written.")
        return cls(tokenizer, config["chat_template"], validate(config["trivet"], Markers, f"{files[1]} trivet"))

    def save(self, directory: Path) -> None:
        write_atomic(Path(directory) / "tokenizer.json", self.tokenizer.to_str(pretty=True))
        text = json.dumps(self.config(), indent=1, ensure_ascii=False) + "\n"
        write_atomic(Path(directory) / "tokenizer_config.json", text)

    def config(self) -> dict[str, Any]:
        """The content of tokenizer_config.json."""
        return {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": self.markers.end,
            "chat_template": self.template,
            "trivet": self.markers.model_dump(),
        }

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.get_vocab_size()

    # --- text <-> ids ----------------------------------------------------------------------------
    def encode_text(self, text: str) -> list[int]:
        """Plain text, in which tags are characters. Raises UserError for one the tokenizer can't write."""
        return self._encode(self._literal, text)

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=False)

    def _encode(self, tokenizer: Tokenizer, text: str) -> list[int]:
        if not text:
            return []
        encoded = tokenizer.encode(text, add_special_tokens=False)
        unknown = tokenizer.token_to_id("<unk>")
        if unknown is not None and unknown in encoded.ids:
            start, end = encoded.offsets[encoded.ids.index(unknown)]
            raise UserError(f"The tokenizer has no {text[start:end]!r}, so it can't read {text[:60]!r}.")
        return encoded.ids

    def _one(self, marker: str) -> int:
        """Its id; -1, which no token equals, where the tokenizer has no such tag."""
        if not marker:
            return -1
        ids = self.tokenizer.encode(marker, add_special_tokens=False).ids
        if len(ids) != 1 or ids[0] == self.tokenizer.token_to_id("<unk>"):
            raise UserError(f"The marker {marker!r} must be one token of the tokenizer, it is {len(ids)}.")
        return ids[0]

    # --- conversation -> ids ---------------------------------------------------------------------
    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[ToolSpec] = (),
        thinking: bool = True,
        generate: bool = False,
    ) -> Rendered:
        """The conversation as the model sees it; `generate`: ready for the next assistant message.

        thinking=False closes the thinking block before the last assistant message begins.
        """
        views = [self._view(messages, i, thinking) for i in range(len(messages))]
        shut = generate and not thinking and not (messages and messages[-1].role == "tool")
        specs = [{"name": t.name, "description": t.description, "parameters": dict(t.parameters)} for t in tools]
        if self.markers.tool_syntax == "bare":
            specs = []
        try:
            text = self._compiled.render(messages=views, tools=specs, shut=shut, **self.markers.model_dump())
        except TemplateError as e:
            raise UserError(f"The chat template can't render this conversation: {e}.") from None
        return self._tokenise(text, messages)

    def _view(self, messages: Sequence[Message], i: int, thinking: bool) -> dict[str, Any]:
        """What the template sees of one message."""
        m = messages[i]
        after_tool = i > 0 and messages[i - 1].role == "tool"
        began = m.completion.prompt_tokens[-2:] if m.completion is not None else ()  # what it was written behind stays
        shut = began == (self.think_open_id, self.think_close_id) or (not thinking and i == len(messages) - 1)
        return {
            "role": m.role,
            "content": _typed(m.content),
            "reasoning": None if m.reasoning is None else _typed(m.reasoning),
            "opens": m.reasoning is not None and not after_tool,
            "closes": m.reasoning is not None and not m.tool_calls,
            "shut": m.role == "assistant" and shut,
            "cut": m.cut,
            "calls": [_typed(self._call_text(call)) for call in m.tool_calls],
            "spliced": f"{SPLICE}{i}{SPLICED}" if m.completion is not None else "",
        }

    def _call_text(self, call: ToolCall) -> str:
        if self.markers.tool_syntax == "bare":
            return " ".join(str(value) for value in call.arguments.values())
        return json.dumps({"name": call.name, "arguments": dict(call.arguments)}, ensure_ascii=False)

    def _tokenise(self, text: str, messages: Sequence[Message]) -> Rendered:
        ids: list[int] = []
        mask: list[bool] = []
        generated = plain = False
        for piece in MARKS.split(text):
            if piece in (GENERATED, WRITTEN):
                generated = piece == GENERATED
            elif piece in (PLAIN, TYPED):
                plain = piece == PLAIN
            elif piece.startswith(SPLICE):
                completion = messages[int(piece[1:-1])].completion
                assert completion is not None
                ids += completion.tokens
                mask += completion.sampled
            else:
                new = self._encode(self._literal if plain else self.tokenizer, piece)
                ids += new
                mask += [generated] * len(new)
        return Rendered(ids, mask)

    # --- thinking or not -------------------------------------------------------------------------
    @property
    def thinks(self) -> Thinks:
        """never: no thinking tags that an engine could watch; always: the template asks for a thought in any case."""
        return "never" if self.think_close_id < 0 else "can"

    def thinking_for(
        self, messages: Sequence[Message], asked: int | Literal["off"] | None
    ) -> int | Literal["off"] | None:
        """`Sampling.thinking` for what the people in this conversation typed: "off", or what was asked.

        The last `/think` or `/no_think` in a user or system message counts, for its turn and later ones; what is
        asked "off" stays off (Qwen3's rule). Only a conversation with a person means these words so: tasks and
        training don't ask here. A model that never or always thinks has no such switch.
        """
        said = [
            m[1] for turn in messages if turn.role in ("user", "system") for m in SOFT_SWITCH.finditer(turn.content)
        ]
        return "off" if said and said[-1] and self.thinks == "can" else asked

    # --- ids -> message --------------------------------------------------------------------------
    def thinking_open(self, ids: Sequence[int]) -> bool:
        """Whether text that follows these ids stands inside a thinking block."""
        if self.thinks == "never":  # a prompt that ends with the tag, written out
            opening = self.markers.think_open
            return bool(opening) and self.decode(ids[-2 * len(opening) :]).rstrip("\n").endswith(opening)
        for token in reversed(ids):
            if token in (self.think_open_id, self.think_close_id):
                return token == self.think_open_id
        return False

    def parse(
        self, ids: Iterable[int], thinking: bool = False, tools: Sequence[ToolSpec] = (), stops: Sequence[str] = ()
    ) -> Message:
        """The assistant's message. Never raises: what can't be understood stays text.

        thinking: the prompt already opened the thinking block (after a tool result inside it).
        tools: what was offered; it says how arguments that are written as text are typed.
        stops: strings before which the text ends.
        """
        splitter = self.splitter(thinking, tools, stops)
        splitter.push(ids)
        splitter.finish()
        return splitter.message()

    def splitter(self, thinking: bool = False, tools: Sequence[ToolSpec] = (), stops: Sequence[str] = ()) -> Splitter:
        return Splitter(self, thinking, tools, stops)

    def closes_call(self, ids: Sequence[int]) -> bool:
        """Whether a tool call has just been closed, for tags that are no token (`tool_close_id` is -1)."""
        close = self.markers.tool_close
        if not close or self.tool_close_id >= 0 or close not in self.decode(ids[-2 * len(close) :]):
            return False
        return bool(self.parse(ids, thinking=True).tool_calls)  # inside a thought or after it: a call is a call


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}`: what the assistant wrote, as in transformers."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        mark = [nodes.Output([nodes.TemplateData(m)]) for m in (GENERATED, WRITTEN)]
        return nodes.Scope([mark[0], *body, mark[1]]).set_lineno(line)


def _typed(text: str) -> str:
    """Mark text that is not the template's own, so that tags in it stay characters."""
    return PLAIN + re.sub("[\ue000-\ue005]", "", text) + TYPED if text else ""
