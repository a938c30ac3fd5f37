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
from pathlib import Path
from typing import Any, Literal

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from trivet.config import UserError, validate
from trivet.disk import write_atomic
from trivet.messages import Event, Message, ToolCall, ToolSpec
from trivet.spec import Frozen

GENERATED, WRITTEN, PLAIN, TYPED, SPLICE, SPLICED = "\ue000\ue001\ue002\ue003\ue004\ue005"  # pairs of marks
MARKS = re.compile(f"([{GENERATED}{WRITTEN}{PLAIN}{TYPED}]|{SPLICE}\\d+{SPLICED})")


class Markers(Frozen):
    """The tags of a tokenizer, by role; "" where it has none. Kept in tokenizer_config.json under "trivet"."""

    think_open: str = "<think>"
    think_close: str = "</think>"
    tool_open: str = "<tool_call>"
    tool_close: str = "</tool_call>"
    end: str = "<end>"
    closing_message: str = "…"  # what the engine writes before think_close when the budget is spent
    tool_syntax: Literal["bare", "json"] = "bare"
    transformers: bool = False  # the template is a checkpoint's own: see chat_template.py
    single_turn: bool = False  # training showed one question a conversation, so a second one would be foreign to it


@dataclass(frozen=True)
class Rendered:
    """A conversation as ids; mask is True where the assistant wrote (and a loss belongs)."""

    ids: list[int]
    mask: list[bool]


class Chat:
    """A tokenizer with its template and markers. Raises UserError where a marker is not one token."""

    def __init__(self, tokenizer: Tokenizer, template: str, markers: Markers) -> None:
        self.tokenizer, self.template, self.markers = tokenizer, template, markers
        self._literal = Tokenizer.from_str(tokenizer.to_str())
        self._literal.encode_special_tokens = True  # tags are plain characters to this one
        try:
            self._compiled = self.environment().from_string(template)
        except TemplateError as e:
            raise UserError(f"The chat template can't be read: {e}.") from None
        self.think_open_id, self.think_close_id = self._one(markers.think_open), self._one(markers.think_close)
        self.tool_open_id, self.tool_close_id = self._one(markers.tool_open), self._one(markers.tool_close)
        self.end_id = self._one(markers.end)
        closing = [*self.encode_text(markers.closing_message), self.think_close_id]
        self.closing_ids = closing if self.think_close_id >= 0 else []  # no tags: nothing to close

    def environment(self) -> ImmutableSandboxedEnvironment:
        """What a template may do."""
        made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation])
        made.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
        return made

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
            from trivet.chat_template import TemplateChat

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
        return {
            "role": m.role,
            "content": _typed(m.content),
            "reasoning": None if m.reasoning is None else _typed(m.reasoning),
            "opens": m.reasoning is not None and not after_tool,
            "closes": m.reasoning is not None and not m.tool_calls,
            "shut": m.role == "assistant" and not thinking and i == len(messages) - 1,
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

    # --- ids -> message --------------------------------------------------------------------------
    def thinking_open(self, ids: Sequence[int]) -> bool:
        """Whether text that follows these ids stands inside a thinking block."""
        for token in reversed(ids):
            if token in (self.think_open_id, self.think_close_id):
                return token == self.think_open_id
        return False

    def parse(self, ids: Iterable[int], thinking: bool = False) -> Message:
        """The assistant's message. Never raises: what can't be understood stays text.

        thinking: the prompt already opened the thinking block (after a tool result inside it).
        """
        splitter = self.splitter(thinking)
        splitter.push(ids)
        splitter.finish()
        return splitter.message()

    def splitter(self, thinking: bool = False) -> Splitter:
        return Splitter(self, thinking)

    def read_call(self, text: str, number: int) -> ToolCall:
        """The text between tool tags as a call; `error` says what was wrong with it.

        Bare syntax has no name: the text is the only argument of the only tool, written as {"": text}.
        """
        name = f"call-{number}"
        if self.markers.tool_syntax == "bare":
            return ToolCall(name, "", {"": text})
        try:
            call = json.loads(text)
        except ValueError as e:
            return ToolCall(name, "", {}, f"the call is not valid JSON: {e}")
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            return ToolCall(name, "", {}, 'the call must be an object with "name" and "arguments"')
        arguments = call.get("arguments", {})
        if not isinstance(arguments, dict):
            return ToolCall(name, call["name"], {}, '"arguments" must be an object')
        return ToolCall(name, call["name"], arguments)


class Splitter:
    """Tokens in, events out: thinking, text and tool calls told apart while they stream."""

    def __init__(self, chat: Chat, thinking: bool) -> None:
        self.chat, self.thinking = chat, thinking
        self.reasoning: str | None = "" if thinking else None
        self.content = ""
        self.calls: list[ToolCall] = []
        self._call: list[int] | None = None  # ids since an open tool tag
        self._pending: list[int] = []  # ids whose bytes may not be whole characters yet

    def push(self, ids: Iterable[int]) -> list[Event]:
        events: list[Event] = []
        for token in ids:
            events += self._token(token)
        return events

    def finish(self) -> list[Event]:
        """End of the completion: an unclosed call was only text."""
        return self._drop_call() + self._flush(final=True)

    def message(self) -> Message:
        return Message("assistant", self.content, self.reasoning, tuple(self.calls))

    def _token(self, token: int) -> list[Event]:
        chat = self.chat
        if token == chat.end_id:
            return self.finish()
        if token == chat.think_close_id and self.thinking:
            events = self.finish()
            self.thinking = False
            return events
        if self._call is not None:
            if token != chat.tool_close_id:
                self._call.append(token)
                return []
            text, self._call = chat.decode(self._call[1:]), None
            self.calls.append(chat.read_call(text, len(self.calls)))
            return [Event("tool_call", text)]
        if token == chat.think_open_id and not self.thinking:
            events = self._flush(final=True)
            self.thinking, self.reasoning = True, self.reasoning or ""
            return events
        if token == chat.tool_open_id:
            events = self._flush(final=True)
            self._call = [token]
            return events
        self._pending.append(token)
        return self._flush(final=False)

    def _drop_call(self) -> list[Event]:
        if self._call is None:
            return []
        self._pending += self._call
        self._call = None
        return self._flush(final=True)

    def _flush(self, final: bool) -> list[Event]:
        text = self.chat.decode(self._pending)
        if not text or (text.endswith("\ufffd") and not final):
            return []  # a character's bytes are still arriving
        self._pending = []
        if self.thinking:
            self.reasoning = (self.reasoning or "") + text
            return [Event("reasoning", text)]
        self.content += text
        return [Event("text", text)]


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


# ----------------------------------------------------------------------------------- built-in tokenizers
SPECIAL = (
    "<pad> <unk> <end> <system> <user> <assistant> <think> </think> <tool_call> </tool_call> "
    "<tool_response> </tool_response>"
).split()

TEMPLATE = """\
{%- if tools -%}
<system>You may call these tools, one JSON object a call between {{ tool_open }} and {{ tool_close }}:
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}
{%- endif -%}
{%- for m in messages -%}
{%- if m.role == "system" -%}<system>{{ m.content }}
{%- elif m.role == "user" -%}<user>{{ m.content }}<assistant>
{%- elif m.role == "tool" -%}<tool_response>{{ m.content }}</tool_response>
{%- else -%}
{%- if m.shut -%}<think></think>{%- endif -%}
{%- generation -%}
{%- if m.spliced -%}{{ m.spliced }}
{%- elif m.reasoning is not none -%}
{%- if m.opens -%}<think>{%- endif -%}{{ m.reasoning }}
{%- endif -%}
{%- endgeneration -%}
{%- if m.cut and not m.spliced -%}{{ closing_message }}</think>{%- endif -%}
{%- generation -%}
{%- if not m.spliced -%}
{%- if m.closes and not m.cut -%}</think>{%- endif -%}
{{ m.content }}
{%- for call in m.calls -%}<tool_call>{{ call }}</tool_call>{%- endfor -%}
{%- if not m.calls -%}<end>{%- endif -%}
{%- endif -%}
{%- endgeneration -%}
{%- endif -%}
{%- endfor -%}
{%- if shut -%}<think></think>{%- endif -%}
"""

ALPHABET = [*(chr(code) for code in range(32, 127)), "…", "\n", *(f"={digit}" for digit in range(10))]


def tiny_chat() -> Chat:
    """The demo's alphabet: one token a printable ASCII character, and one for each `=0` .. `=9`."""
    vocab = {token: i for i, token in enumerate([*SPECIAL, *ALPHABET])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"=\d|[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    return Chat(tokenizer, TEMPLATE, Markers(single_turn=True))


def bpe_chat(texts: Iterable[str], vocab_size: int) -> Chat:
    """A byte-level BPE trained on the user's own texts: every text can be written with it."""
    least = 256 + len(SPECIAL)
    if vocab_size < least:
        raise UserError(f"A byte-level tokenizer needs at least {least} tokens, got {vocab_size}.")
    specials = [t for t in SPECIAL if t != "<unk>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(t, special=True, normalized=False) for t in specials],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    markers = Markers(closing_message="\nTime is up, so I answer now.\n", tool_syntax="json", single_turn=True)
    return Chat(tokenizer, TEMPLATE, markers)
