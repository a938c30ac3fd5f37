"""A checkpoint's template, and what can be found out about it by rendering conversations whose answer is known.

Templates differ in what they take (content as text or as parts, arguments as an object or as JSON) and in what
they write. Neither stands in a file, and a wrong guess is silent: MiniMax-M1's template, given a string, shows
nothing of it. So the forms are tried until everything that was said is in the text; the syntax of tool calls is
the row of the table that reads the template's own call back; a switch for thinking is there if it changes the
prompt.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import Template, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from trivet.chat.syntax import SYNTAXES, Name, Syntax, read_calls
from trivet.config import UserError
from trivet.messages import Message, ToolCall, ToolSpec

ASKED, SAID, RESULT = "Qasked", "Qsaid", "Qresult"
CALL = ToolCall("call-0", "qtool", {"qword": "Qword", "qnumber": 7})
TOOL = ToolSpec(
    "qtool", "Qtool.",
    {"type": "object", "properties": {"qword": {"type": "string"}, "qnumber": {"type": "integer"}}},
)  # fmt: skip


@dataclass(frozen=True)
class Form:
    """How a template wants its messages.

    parts: content is a list of {"type": "text", "text": ...}, not a string.
    written: the arguments of a call are JSON text, not an object.
    no_content: a message that only calls has content None, not "".
    nine: the ids of calls have nine letters or digits (Mistral).
    """

    parts: bool = False
    written: bool = False
    no_content: bool = False
    nine: bool = False


@dataclass(frozen=True)
class Found:
    """What a template takes and does. syntax: of its tool calls, None where none is recognised."""

    form: Form
    syntax: Name | None
    shows: bool  # what is said is in the text
    tells_tools: bool  # the tools that are offered are in the text
    prompt: str  # of a question, with thinking; "" where the template refuses one
    switch: bool  # thinking or not changes it


class Jinja:
    """A compiled template with the special tokens that it refers to, such as bos_token."""

    def __init__(self, compiled: Template, named: dict[str, str]) -> None:
        self.compiled, self.named = compiled, named

    def text(
        self,
        views: Sequence[dict[str, Any]],
        tools: Sequence[ToolSpec] = (),
        thinking: bool = True,
        generate: bool = False,
    ) -> str:
        """Raises UserError where the template refuses or fails."""
        offered = [
            {"type": "function", "function": {"name": t.name, "description": t.description, "parameters": t.parameters}}
            for t in tools
        ]
        try:
            return self.compiled.render(
                messages=list(views), tools=offered or None, add_generation_prompt=generate,
                enable_thinking=thinking, thinking=thinking, **self.named,  # Qwen3's name for it, and DeepSeek-V3.1's
            )  # fmt: skip
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as e:
            raise UserError(f"The chat template can't render this conversation: {e}.") from None


def dress(environment: ImmutableSandboxedEnvironment) -> ImmutableSandboxedEnvironment:
    """What transformers gives to templates."""
    environment.add_extension("jinja2.ext.loopcontrols")
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda how: datetime.now().strftime(how)
    environment.filters["tojson"] = _tojson
    return environment


def _refuse(why: str) -> NoReturn:
    raise TemplateError(why)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **_: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, default=dict)


def view(messages: Sequence[Message], i: int, form: Form, typed: Callable[[Any], Any]) -> dict[str, Any]:
    """What a template sees of one message; `typed` passes over every text that is not the template's own."""
    m = messages[i]
    found: dict[str, Any] = {"role": m.role, "content": typed(m.content)}
    if m.reasoning is not None:
        found["reasoning_content"] = typed(m.reasoning)
    if m.tool_calls:
        calls = [{"name": typed(c.name), "arguments": typed(dict(c.arguments))} for c in m.tool_calls]
        if form.written:
            calls = [{**call, "arguments": json.dumps(call["arguments"], ensure_ascii=False)} for call in calls]
        found["tool_calls"] = [
            {"type": "function", "id": _id(c.id, form), "function": call}
            for c, call in zip(m.tool_calls, calls, strict=True)
        ]
        if form.no_content and not m.content:
            found["content"] = None
    name = None
    if m.tool_call_id is not None:
        found["tool_call_id"] = _id(m.tool_call_id, form)
        earlier = (c for before in reversed(messages[:i]) for c in before.tool_calls if c.id == m.tool_call_id)
        name = next((typed(c.name) for c in earlier), None)
    if name is not None:
        found["name"] = name
    if form.parts and found["content"] is not None:
        part = {"type": "text", "text": found["content"]}
        found["content"] = [part if name is None else {**part, "name": name}]
    return found


def _id(id: str, form: Form) -> str:
    return "".join(filter(str.isalnum, id)).rjust(9, "0")[-9:] if form.nine else id


# ------------------------------------------------------------------------------------------ finding out
def look(jinja: Jinja, end: str) -> Found:
    """Try the forms of messages; `end` is the tag that ends a turn."""
    plain = [Message("user", ASKED), Message("assistant", SAID), Message("user", RESULT)]
    shown = [(talk, p) for talk in (plain, plain[:1]) for p in (False, True)
             if _all_in(_try(jinja, talk, Form(parts=p)), *(m.content for m in talk))]  # fmt: skip
    parts = shown[0][1] if shown else None
    forms = [Form(parts or False, *rest) for rest in itertools.product((False, True), repeat=3)]
    read = [(f, name, length) for f in forms for name, length in _read_back(jinja, f, end)]
    # The shortest text: some templates write an empty turn beside a call whose content is "".
    form, syntax, _ = min(read, key=lambda found: found[2], default=(forms[0], None, 0))
    asked = _try(jinja, plain[:1], form, generate=True)
    told = _try(jinja, plain[:1], form, [TOOL], generate=True)
    if syntax is None:
        syntax = next((n for n, s in SYNTAXES.items() if s.named and _all_in(told, s.open, s.told, TOOL.name)), None)
    return Found(
        form, syntax, shows=parts is not None or asked == "", tells_tools=_all_in(told, TOOL.name), prompt=asked,
        switch=asked != _try(jinja, plain[:1], form, generate=True, thinking=False),
    )  # fmt: skip


def _try(jinja: Jinja, messages: Sequence[Message], form: Form, tools: Sequence[ToolSpec] = (), **how: bool) -> str:
    """The text; "" where the template refuses, which it will say itself when it is asked in earnest."""
    try:
        return jinja.text([view(messages, i, form, lambda text: text) for i in range(len(messages))], tools, **how)
    except UserError:
        return ""


def _all_in(text: str, *words: str) -> bool:
    return all(word in text for word in words)


def _read_back(jinja: Jinja, form: Form, end: str) -> list[tuple[Name, int]]:
    """The syntaxes in which the template writes a call, at most one, with the length of the text."""
    question, call = Message("user", ASKED), Message("assistant", tool_calls=(CALL,))
    text = _try(jinja, [question, call, Message("tool", RESULT, tool_call_id=CALL.id)], form)
    if not _all_in(text, ASKED, RESULT):
        return []
    prompt = _try(jinja, [question], form, generate=True)
    return [(name, len(text)) for name, s in SYNTAXES.items() if s.named and _block_reads(s, text, prompt, end)][:1]


def _block_reads(syntax: Syntax, text: str, prompt: str, end: str) -> bool:
    _, opened, block = text.rpartition(syntax.open)
    if not opened and syntax.start and text.startswith(prompt + syntax.start):  # as the answer's very first words
        opened, block = syntax.start, text[len(prompt) :]
    block = block.partition(syntax.close or end)[0]
    found = read_calls(syntax, block, 0, [TOOL]) if opened else []
    return [(c.name, dict(c.arguments)) for c in found if not c.error] == [(CALL.name, dict(CALL.arguments))]
