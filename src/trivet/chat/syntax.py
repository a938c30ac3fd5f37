"""How models write tool calls: one row a syntax, one reader for all rows.

    ... text <open> call call ... <close> text ...

A block holds one call or more. Either each is JSON, {"name": ..., "arguments": {...}}, or a pattern cuts
the calls out; then their arguments are JSON, or a second pattern cuts out parameter by parameter.

    | row           | who writes it                    | one call                                                  |
    | bare          | the demo's models                | the only argument of the only tool                        |
    | json          | Hermes, Qwen2.5, Qwen3; bpe_chat | {"name": N, "arguments": {...}}                           |
    | qwen-xml      | Qwen3-Coder                      | <function=N> <parameter=K> V </parameter> </function>     |
    | deepseek      | DeepSeek-V3, R1                  | function<sep>N, then the arguments in a json code block   |
    | deepseek-v3.1 | DeepSeek-V3.1                    | N<sep>{...}                                               |
    | minimax-lines | MiniMax-M1                       | {"name": N, "arguments": {...}}, one a line               |
    | minimax-xml   | MiniMax-M2                       | <invoke name="N"> <parameter name="K">V</parameter> </invoke> |
    | mistral       | Mistral since v3                 | [{"name": N, "arguments": {...}}, ...]                    |
    | mistral-args  | Mistral since v11                | N[ARGS]{...}                                              |
    | llama         | Llama 3.1 to 3.3                 | {"name": N, "parameters": {...}}, often without a tag     |

How results go back is in the checkpoint's template, which renders them (see template.py). Nothing here
raises because of what a model wrote, and nothing it wrote is lost: what can't be understood becomes a
`ToolCall` with `error`, and every call keeps its `text`. Not read: several rows in one vocabulary, Llama's
built-in tools (`brave_search.call(...)`).
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

from trivet.messages import ToolCall, ToolSpec

Name = Literal[
    "bare",
    "json",
    "qwen-xml",
    "deepseek",
    "deepseek-v3.1",
    "minimax-lines",
    "minimax-xml",
    "mistral",
    "mistral-args",
    "llama",
]
KEYS = {"name", "arguments", "parameters", "id", "type"}  # of a call in JSON; others would be lost


@dataclass(frozen=True)
class Syntax:
    """One row: `open` and `close` are its tags, "" for a block that goes on to the end of the message.

    call: cuts calls out of a block, with groups `name` and `body`; None: the calls are JSON.
    parameter: cuts arguments out of a body, with groups `key` and `value`; None: the body is a JSON object.
    named: a call says which tool it wants.
    start: with tools offered, a message that begins with this is a call without a tag.
    told: stands, beside `open`, in a prompt that explains this syntax.
    """

    open: str
    close: str
    call: re.Pattern[str] | None = None
    parameter: re.Pattern[str] | None = None
    named: bool = True
    start: str = ""
    told: str = ""


def _pattern(text: str) -> re.Pattern[str]:
    return re.compile(text, re.DOTALL)


SYNTAXES: dict[Name, Syntax] = {
    "bare": Syntax(
        "<tool_call>", "</tool_call>", named=False,
        call=_pattern(r"\A(?P<name>)(?P<body>.*)"), parameter=_pattern(r"\A(?P<key>)(?P<value>.*)"),
    ),
    "qwen-xml": Syntax(
        "<tool_call>", "</tool_call>", told="<function=",
        call=_pattern(r"<function=(?P<name>[^>\n]*)>(?P<body>.*?)</function>"),
        parameter=_pattern(r"<parameter=(?P<key>[^>\n]*)>\n?(?P<value>.*?)\n?</parameter>"),
    ),
    "json": Syntax("<tool_call>", "</tool_call>", told='{"name"'),
    "deepseek": Syntax(
        "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", told="```json",
        call=_pattern(
            r"<｜tool▁call▁begin｜>\w+<｜tool▁sep｜>(?P<name>[^\n<]*)\n```json\n(?P<body>.*?)\n```\s*<｜tool▁call▁end｜>"
        ),
    ),
    "deepseek-v3.1": Syntax(
        "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", told="<｜tool▁sep｜>",
        call=_pattern(r"<｜tool▁call▁begin｜>(?P<name>[^\n<]*)<｜tool▁sep｜>(?P<body>.*?)<｜tool▁call▁end｜>"),
    ),
    "minimax-lines": Syntax("<tool_calls>", "</tool_calls>", told='{"name"'),
    "minimax-xml": Syntax(
        "<minimax:tool_call>", "</minimax:tool_call>", told="<invoke name=",
        call=_pattern(r'<invoke name="(?P<name>[^"\n]*)">(?P<body>.*?)</invoke>'),
        parameter=_pattern(r'<parameter name="(?P<key>[^"\n]*)">(?P<value>.*?)</parameter>'),
    ),
    "mistral-args": Syntax(
        "[TOOL_CALLS]",
        "",
        told="[ARGS]",
        call=_pattern(
            r"(?:\[TOOL_CALLS\])?(?P<name>[^\[\]{}\s]+)(?:\[CALL_ID\]\w+)?\[ARGS\](?P<body>.*?)(?=\[TOOL_CALLS\]|\Z)"
        ),
    ),
    "mistral": Syntax("[TOOL_CALLS]", "", told="[AVAILABLE_TOOLS]"),
    "llama": Syntax("<|python_tag|>", "", start='{"name"', told='"parameters"'),
}  # fmt: skip


def read_calls(syntax: Syntax, block: str, first: int = 0, tools: Sequence[ToolSpec] = ()) -> list[ToolCall]:
    """The calls of a block, at least one; `first` is the number of the first call of the message.

    tools: what was offered. Their schemas say which parameters that were cut out of text are not strings.
    """
    found = list(_json_pieces(block) if syntax.call is None else _cut(syntax.call, block))
    calls: list[ToolCall] = []
    for text, piece in found or [(block, None)]:
        id = f"call-{first + len(calls)}"
        name, body = "", None
        try:
            if piece is None:
                raise ValueError(_why_not(syntax, text))
            name, body = (piece["name"].strip(), piece["body"]) if isinstance(piece, re.Match) else _named(piece)
            if syntax.named and not name:
                raise ValueError("the call names no tool")
            if isinstance(body, str):
                body = _object(body) if syntax.parameter is None else _parameters(syntax.parameter, body, name, tools)
            calls.append(ToolCall(id, name, body, text=text))
        except (ValueError, RecursionError) as e:
            calls.append(ToolCall(id, name, {}, f"{e or 'the call is nested too deeply'}", text))
    return calls


def _why_not(syntax: Syntax, text: str) -> str:
    if not text.strip():
        return "the call is empty"
    if syntax.call is not None:
        return f"this is no call: {text.strip()[:200]!r}"
    try:
        _decode(text)
    except (ValueError, RecursionError) as e:
        return f"the call is not valid JSON: {e or 'nested too deeply'}"
    return f"this is no call: {text.strip()[:200]!r}"


def _cut(pattern: re.Pattern[str], text: str) -> Iterator[tuple[str, re.Match[str] | None]]:
    """Every match with its text, and what stands between matches with None."""
    at = 0
    for match in pattern.finditer(text):
        if text[at : match.start()].strip():
            yield text[at : match.start()], None
        yield match[0], match
        at = match.end()
    if text[at:].strip():
        yield text[at:], None


# ------------------------------------------------------------------------------------------ JSON calls
def _json_pieces(block: str) -> Iterator[tuple[str, Any]]:
    """The JSON objects of a block, written one after another or as a list; the rest of it with None."""
    text, between, at = block.strip(), "", 0
    whole = text
    if text.startswith("[") and text.endswith("]"):
        text, between = text[1:-1], ","
    while text[at:].strip():
        start = at + len(text[at:]) - len(text[at:].lstrip().removeprefix(between if at else "").lstrip())
        try:
            value, end = DECODER.raw_decode(text, start)
        except (ValueError, RecursionError):
            yield text[start:] if at else whole, None
            return
        yield text[start:end], value
        at = end


def _named(value: Any) -> tuple[str, dict[str, Any]]:
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise ValueError('the call must be an object with "name" and "arguments"')
    if unknown := value.keys() - KEYS:
        raise ValueError(f'a call has "name" and "arguments", not {sorted(unknown)[0]!r}')
    given = [value[key] for key in ("arguments", "parameters") if key in value]
    if len(given) > 1 or not all(isinstance(g, dict) for g in given):
        raise ValueError('"arguments" must be one object')
    return value["name"], given[0] if given else {}


def _object(text: str) -> dict[str, Any]:
    try:
        value = _decode(text)
    except ValueError as e:
        raise ValueError(f"the arguments are not valid JSON: {e}") from None
    if not isinstance(value, dict):
        raise ValueError('"arguments" must be an object')
    return value


def _decode(text: str) -> Any:
    return DECODER.decode(text)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object in which no key hides another and every text can be written again."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key is there twice")
    json.dumps(found, ensure_ascii=False).encode()  # half a surrogate pair can't be
    return found


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON number")


DECODER = json.JSONDecoder(object_pairs_hook=_once, parse_constant=_no_number)


# ------------------------------------------------------------------------------------- parameters in text
def _parameters(pattern: re.Pattern[str], body: str, name: str, tools: Sequence[ToolSpec]) -> dict[str, Any]:
    schema: Mapping[str, Any] = next((t.parameters for t in tools if t.name == name), {})
    properties = schema.get("properties", {})
    found: dict[str, Any] = {}
    for text, match in _cut(pattern, body):
        if match is None:
            raise ValueError(f"this is no parameter: {text.strip()[:200]!r}")
        if match["key"] in found:
            raise ValueError(f"parameter {match['key']!r} is there twice")
        found[match["key"]] = _value(match["value"], properties.get(match["key"], {}))
    return found


def _value(text: str, schema: Mapping[str, Any]) -> Any:
    """A parameter's value: text, unless the tool declared it as something else and it reads as that."""
    types = {option.get("type") for option in (schema, *schema.get("anyOf", ()))} - {None}
    if not types or "string" in types:
        return text
    try:
        return _decode(text)
    except (ValueError, RecursionError):
        pass
    try:  # Qwen's template writes True, None and {'a': 1}
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text  # the tool says what is wrong with it
