"""A checkpoint's own tokenizer and chat template, as transformers' `apply_chat_template` would use them.

Same text, same ids, with three differences that training and safety need:

* a user who types `<|im_end|>` sends the plain characters, in any part of the conversation;
* what a model wrote stays its own ids: the conversation so far is the completion's prompt and tokens, and
  only what comes after it is rendered (many templates drop earlier reasoning; here the model saw it);
* the template's switch `enable_thinking` is used where there is one, else an empty thought is appended.

Thinking and tool tags are those of the vocabulary, if each is one token. A loss belongs to what the last
message says, since templates in this form do not mark what the assistant wrote.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from trivet.chat import TEMPLATE, Chat, Markers, Rendered, Splitter
from trivet.config import UserError, validate
from trivet.messages import Message, ToolSpec

GAP = "\ue006"  # stands inside a tag that somebody typed, so that it is none
# Qwen3's own words for an ended thought (its documentation, "thinking budget").
CLOSING = (
    "\n\nConsidering the limited time by the user, I have to give the solution based on the thinking directly now.\n"
)
MARK = "\ue007"  # where an earlier answer stood
OURS = re.compile(f"[{GAP}{MARK}]")
EARLIER = (Message("user", "?"), Message("assistant", MARK))


class TemplateChat(Chat):
    """`named`: the special tokens that templates refer to, such as bos_token."""

    def __init__(self, tokenizer: Tokenizer, template: str, markers: Markers, named: dict[str, str]) -> None:
        self._tag_ids = {t.content: id for id, t in tokenizer.get_added_tokens_decoder().items()}
        longest_first = sorted(self._tag_ids, key=len, reverse=True)
        self._tags = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self.named = named
        super().__init__(tokenizer, template, markers)
        self._switch = "enable_thinking" in template

    @classmethod
    def read(cls, directory: Path, tokenizer: Tokenizer, config: dict[str, Any]) -> TemplateChat:
        """From tokenizer.json and tokenizer_config.json. Raises UserError where the template is missing."""
        file = Path(directory) / "chat_template.jinja"
        template = file.read_text() if file.is_file() else config.get("chat_template")
        if not isinstance(template, str):
            raise UserError(f"{str(directory)!r} has no chat template, so a conversation can't be written for it.")
        named = {}
        for key in ("bos_token", "eos_token", "pad_token", "unk_token"):
            value = config.get(key)
            text = value.get("content") if isinstance(value, dict) else value
            if isinstance(text, str):
                named[key] = text
        if "eos_token" not in named:
            raise UserError(f"{str(directory)!r}: tokenizer_config.json names no eos_token, so no turn would end.")
        if "trivet" in config:
            return cls(tokenizer, template, validate(config["trivet"], Markers, f"{directory} trivet"), named)

        def known(*tags: str) -> bool:
            return all(tokenizer.token_to_id(tag) is not None for tag in tags)

        tags: dict[str, str] = {"end": named["eos_token"], "closing_message": CLOSING}
        for role in ("think", "tool"):
            opening, closing = {"think": ("<think>", "</think>"), "tool": ("<tool_call>", "</tool_call>")}[role]
            there = known(opening, closing)
            tags |= {f"{role}_open": opening if there else "", f"{role}_close": closing if there else ""}
        return cls(tokenizer, template, Markers(**tags, tool_syntax="json", transformers=True), named)

    def config(self) -> dict[str, Any]:
        return super().config() | self.named

    def environment(self) -> ImmutableSandboxedEnvironment:
        made = super().environment()
        made.add_extension("jinja2.ext.loopcontrols")
        made.globals["raise_exception"] = _refuse
        made.globals["strftime_now"] = lambda how: datetime.now().strftime(how)
        made.filters["tojson"] = _tojson
        return made

    # --- conversation -> ids ---------------------------------------------------------------------
    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[ToolSpec] = (),
        thinking: bool = True,
        generate: bool = False,
    ) -> Rendered:
        """See Chat.render. Raises UserError where the template refuses, or tools have no tags."""
        if tools and self.tool_open_id < 0:
            raise UserError("This model's vocabulary has no <tool_call> tags, so it can't be offered tools.")
        wrote = [i for i, m in enumerate(messages) if m.completion is not None]
        if wrote:
            return self._continued(messages, wrote[-1], tools, thinking, generate)
        text = self.text(messages, tools, thinking, generate)
        if generate or not messages or messages[-1].role != "assistant":
            ids = self._ids(text)
            return Rendered(ids, [False] * len(ids))
        asked = self.text(messages[:-1], tools, thinking, generate=True)
        if text.startswith(asked):
            answer, end, after = text[len(asked) :].rpartition(self.markers.end)
        else:  # the prompt opens a thought that the template drops from what is past: written as the model would
            answer, end, after = self._written(messages[-1], asked), self.markers.end, ""
        prompt, said, rest = self._ids(asked), self._ids(answer + end), self._ids(after)
        return Rendered([*prompt, *said, *rest], [False] * len(prompt) + [True] * len(said) + [False] * len(rest))

    def _continued(
        self, messages: Sequence[Message], at: int, tools: Sequence[ToolSpec], thinking: bool, generate: bool
    ) -> Rendered:
        """After the last message that a model wrote: its prompt and tokens as they were, then the new turns."""
        completion = messages[at].completion
        assert completion is not None
        before = self.render(messages[:at], tools, thinking, generate=True)
        known = before.ids == list(completion.prompt_tokens)
        mask = [*(before.mask if known else [False] * len(completion.prompt_tokens)), *completion.sampled]
        ids = [*completion.prompt_tokens, *completion.tokens]
        _, mark, after = self.text([*EARLIER, *messages[at + 1 :]], tools, thinking, generate).partition(MARK)
        if not mark:
            raise UserError("This chat template drops earlier turns, so a conversation can't go on token by token.")
        if completion.tokens[-1:] == (self.end_id,):
            after = after.removeprefix(self.markers.end)
        new = self._ids(after)
        return Rendered([*ids, *new], [*mask, *[False] * len(new)])

    def text(self, messages: Sequence[Message], tools: Sequence[ToolSpec], thinking: bool, generate: bool) -> str:
        """The conversation as text, in which typed tags have a gap."""
        offered = [
            {"type": "function", "function": {"name": t.name, "description": t.description, "parameters": t.parameters}}
            for t in tools
        ]
        try:
            text = self._compiled.render(
                messages=[self._plain(m) for m in messages], tools=offered or None, add_generation_prompt=generate,
                enable_thinking=thinking, **self.named,
            )  # fmt: skip
        except TemplateError as e:
            raise UserError(f"The chat template can't render this conversation: {e}.") from None
        if generate and not thinking and not self._switch and self.think_open_id >= 0:
            opened = text.rstrip("\n").endswith(self.markers.think_open)
            text += (
                f"\n{self.markers.think_close}\n\n"
                if opened
                else f"{self.markers.think_open}\n\n{self.markers.think_close}\n\n"
            )
        return text

    def _written(self, m: Message, asked: str) -> str:
        opened = asked.rstrip("\n").endswith(self.markers.think_open)
        if not opened:
            raise UserError("This chat template writes a question otherwise before its answer than with it.")
        return f"{self._typed(m.reasoning or '')}\n{self.markers.think_close}\n\n{self._typed(m.content)}"

    def _plain(self, m: Message) -> dict[str, Any]:
        content = m.content if m is EARLIER[1] else self._typed(m.content)
        view: dict[str, Any] = {"role": m.role, "content": content}
        if m.reasoning is not None:
            view["reasoning_content"] = self._typed(m.reasoning)
        if m.tool_calls:
            view["tool_calls"] = [
                {"type": "function", "id": c.id, "function": {"name": c.name, "arguments": dict(c.arguments)}}
                for c in m.tool_calls
            ]
        if m.tool_call_id is not None:
            view["tool_call_id"] = m.tool_call_id
        return view

    def _typed(self, text: str) -> str:
        return self._tags.sub(lambda tag: tag[0][0] + GAP + tag[0][1:], OURS.sub("", text))

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = []
        at = 0
        for tag in self._tags.finditer(text):
            ids += self._between(text[at : tag.start()])
            ids.append(self._tag_ids[tag[0]])
            at = tag.end()
        return ids + self._between(text[at:])

    def _between(self, text: str) -> list[int]:
        return [token for piece in text.split(GAP) for token in self._encode(self._literal, piece)]

    # --- ids -> message --------------------------------------------------------------------------
    def splitter(self, thinking: bool = False) -> Splitter:
        return _Stripped(self, thinking)


class _Stripped(Splitter):
    """The line breaks between a tag and its text are the template's, not the model's words."""

    def message(self) -> Message:
        reasoning = None if self.reasoning is None else self.reasoning.strip("\n")
        return Message("assistant", self.content.strip("\n"), reasoning, tuple(self.calls))


def _refuse(why: str) -> NoReturn:
    raise TemplateError(why)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **_: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, default=dict)


# --------------------------------------------------------------------- our own template for transformers
# chat.TEMPLATE with what transformers passes: calls and tools in OpenAI's shape, `enable_thinking`.
FOR_TRANSFORMERS = """\
{%- set shut = enable_thinking is defined and not enable_thinking -%}
{%- if tools and JSON -%}
<system>You may call these tools, one JSON object a call between <tool_call> and </tool_call>:
{% for tool in tools %}{{ tool.function | tojson }}
{% endfor %}
{%- endif -%}
{%- for m in messages -%}
{%- if m.role == "system" -%}<system>{{ m.content }}
{%- elif m.role == "user" -%}<user>{{ m.content }}<assistant>
{%- elif m.role == "tool" -%}<tool_response>{{ m.content }}</tool_response>
{%- else -%}
{%- if shut and loop.last -%}<think></think>{%- endif -%}
{%- generation -%}
{%- if m.reasoning_content is defined and m.reasoning_content is not none -%}
{%- if loop.first or messages[loop.index0 - 1].role != "tool" -%}<think>{%- endif -%}
{{ m.reasoning_content }}
{%- if not m.tool_calls -%}</think>{%- endif -%}
{%- endif -%}
{{ m.content or "" }}
{%- for call in m.tool_calls or [] -%}<tool_call>{{ CALL }}</tool_call>{%- endfor -%}
{%- if not m.tool_calls -%}<end>{%- endif -%}
{%- endgeneration -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt and shut and not (messages and messages[-1].role == "tool") -%}<think></think>{%- endif -%}
"""
CALLS = {
    "json": '{"name": call.function.name, "arguments": call.function.arguments} | tojson',
    "bare": 'call.function.arguments.values() | join(" ")',
}


def tokenizer_files(chat: Chat) -> dict[str, str]:
    """Files, by name, from which transformers makes the same tokenizer and template as `Chat.load` does.

    transformers takes chat_template.jinja; Chat.load goes on with the template in tokenizer_config.json, which
    splices a model's own ids and keeps what was typed apart from tags. Raises UserError for another template.
    """
    special = {"pad_token": "<pad>", "unk_token": "<unk>"}
    known = {key: tag for key, tag in special.items() if chat.tokenizer.token_to_id(tag) is not None}
    config = chat.config() if isinstance(chat, TemplateChat) else chat.config() | known
    files = {
        "tokenizer.json": chat.tokenizer.to_str(pretty=True),
        "tokenizer_config.json": json.dumps(config, indent=1, ensure_ascii=False) + "\n",
    }
    if isinstance(chat, TemplateChat):
        return files
    if chat.template != TEMPLATE:
        raise UserError("This model's chat template is not the one of this version, so transformers can't be given it.")
    syntax = chat.markers.tool_syntax
    template = FOR_TRANSFORMERS.replace("JSON", str(syntax == "json").lower(), 1).replace("CALL", CALLS[syntax], 1)
    return files | {"chat_template.jinja": template}
