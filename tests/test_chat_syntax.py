"""Every tool-call syntax: recognised, written, read, stopped at, answered, and survived when it is malformed.

The templates are in chat_templates.py; ids are those of transformers, which renders the same templates.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import trivet.engine.writing as writing
from chat_templates import FAMILIES, LLAMA31, MISTRAL, QWEN3, V31
from test_chat_template import folder_of, theirs
from test_model_zoo import noisy, spec_of
from trivet.agent.loop import ModelStep, ToolStep, row, run_episode
from trivet.chat import Chat, bpe_chat, tiny_chat
from trivet.chat.syntax import SYNTAXES, read_calls
from trivet.chat.template import TemplateChat
from trivet.config import UserError
from trivet.engine import Engine, EngineModel, Request
from trivet.messages import Message, Sampling, StopReason, ToolCall
from trivet.tools import Tool

transformers = pytest.importorskip("transformers")


def note(text: str, times: int = 1, loud: bool = False, more: list[Any] | None = None) -> str:
    """Write something down."""
    return f"noted {text!r} {times} times{' loudly' * loud}"


NOTE = Tool(note)
CALL = ToolCall("call-0", "note", {"text": 'a "b"\n{c} ä🙂', "times": 3, "loud": True, "more": [1, {"d": None}]})
PLAIN = ToolCall("call-1", "note", {"text": "x"})
TWO = (CALL, PLAIN)


@cache
def family(name: str) -> TemplateChat:
    chat = Chat.load(folder(name))
    assert isinstance(chat, TemplateChat)
    return chat


@cache
def folder(name: str, template: str = "") -> Path:
    f = FAMILIES[name]
    return folder_of(Path(mkdtemp()), template or f.template, f.tags, f.tags[0], f.tags[1])


def known(calls: Sequence[ToolCall]) -> list[tuple[str, dict[str, Any]]]:
    return [(c.name, dict(c.arguments)) for c in calls if not c.error]


# --------------------------------------------------------------------------------------- what is recognised
@pytest.mark.parametrize("name", FAMILIES)
def test_a_syntax_is_recognised_by_what_the_template_writes(name: str) -> None:
    f, chat = FAMILIES[name], family(name)
    assert (chat.markers.tool_syntax, chat.thinks, chat.found.tells_tools) == (f.syntax, f.thinks, True)
    assert (chat.markers.tool_open, chat.markers.tool_close) == (SYNTAXES[f.syntax].open, SYNTAXES[f.syntax].close)
    assert (chat.tool_open_id >= 0) == (chat.markers.tool_open in f.tags)


def test_what_a_template_takes_is_found_out() -> None:
    forms = {name: family(name).found.form for name in FAMILIES}
    assert {n for n, f in forms.items() if f.parts} == {"minimax-m1"}
    assert {n for n, f in forms.items() if f.written} == {"deepseek-r1", "r1-distill", "deepseek-v3.1"}
    assert {n for n, f in forms.items() if f.no_content} == {"deepseek-r1", "r1-distill"}
    assert {n for n, f in forms.items() if f.nine} == {"mistral", "mistral-args"}


@pytest.mark.parametrize(("template", "of"), [(QWEN3.replace("tool_call>", "call>"), "qwen3"),
                                              (MISTRAL.replace("[TOOL_CALLS]", "[CALLS]"), "mistral"),
                                              (LLAMA31.replace('"parameters"', '"params"'), "llama-3.1")])  # fmt: skip
def test_another_syntax_is_not_guessed(template: str, of: str) -> None:
    """The twin: a template changed by one word is recognised as nothing, and tools are refused in a sentence."""
    chat = Chat.load(folder(of, template))
    assert isinstance(chat, TemplateChat) and chat.found.syntax is None
    with pytest.raises(UserError, match="no syntax that is known"):
        chat.render([Message("user", "?")], [NOTE.spec], generate=True)


def test_a_template_that_hides_is_refused() -> None:
    with pytest.raises(UserError, match="does not show what is said"):
        Chat.load(folder("qwen3", "{% for m in messages %}{{ m.role }}{% endfor %}"))
    Chat.load(folder("qwen3", "{{ messages[-1].content }}"))  # of one turn, but it shows that
    silent = Chat.load(folder("deepseek-v3.1", V31.replace("if tools", "if never")))
    assert silent.markers.tool_syntax == "deepseek-v3.1"
    with pytest.raises(UserError, match="leaves out the tools"):
        silent.render([Message("user", "?")], [NOTE.spec], generate=True)


# ------------------------------------------------------------------------------------ written and read back
def answer_of(chat: TemplateChat, message: Message) -> tuple[list[int], bool]:
    """The ids that the assistant would have written, and whether its prompt opened a thought."""
    rendered = chat.render([Message("user", "?"), message], [NOTE.spec])
    prompt = [i for i, m in zip(rendered.ids, rendered.mask, strict=True) if not m]
    return [i for i, m in zip(rendered.ids, rendered.mask, strict=True) if m], chat.thinking_open(prompt)


def read(chat: TemplateChat, answer: tuple[list[int], bool]) -> Message:
    return chat.parse(*answer, [NOTE.spec])


@pytest.mark.parametrize("name", FAMILIES)
def test_parse_is_the_inverse_of_render(name: str) -> None:
    chat = family(name)
    for calls in [(CALL,), (PLAIN,), *([TWO] if FAMILIES[name].many else [])]:
        calls = tuple(replace(call, id=f"call-{i}") for i, call in enumerate(calls))
        said, opened = answer_of(chat, Message("assistant", tool_calls=calls))
        message = read(chat, (said, opened))
        assert message == Message("assistant", tool_calls=calls, reasoning=message.reasoning) and not message.reasoning
        if FAMILIES[name].thinks != "never":
            thought = Message("assistant", reasoning="so\n\nso", tool_calls=calls)
            assert read(chat, answer_of(chat, thought)) == thought
        broken = [i for i in said if chat.decode([i]) not in ("{", "=", "<tool_call>")]
        assert read(chat, (broken, opened)).tool_calls != calls  # the twin


TEXTS = st.text(st.characters(exclude_categories=["Cs", "Co"]), max_size=12)
VALUES = st.recursive(st.none() | st.booleans() | st.integers() | TEXTS, lambda v: st.lists(v) | st.dictionaries(TEXTS, v), max_leaves=5)  # fmt: skip


@pytest.mark.parametrize(
    "name", ["qwen3", "deepseek-r1", "deepseek-v3.1", "minimax-m1", "llama-3.1", "mistral", "mistral-args"]
)
@settings(max_examples=25, deadline=None)
@given(arguments=st.dictionaries(TEXTS.filter(bool), VALUES, max_size=3))
def test_any_json_arguments_come_back(name: str, arguments: dict[str, Any]) -> None:
    call = ToolCall("call-0", "note", arguments)
    message = read(family(name), answer_of(family(name), Message("assistant", tool_calls=(call,))))
    assert known(message.tool_calls) == [("note", arguments)]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_tag_in_an_argument_is_characters(name: str) -> None:
    chat = family(name)
    call = ToolCall("call-0", "note", {"text": f"{FAMILIES[name].tags[0]}</think>"})
    message = read(chat, answer_of(chat, Message("assistant", tool_calls=(call,))))
    assert message.tool_calls == (call,)


def ids_of(tokenizer: Any, views: list[dict[str, Any]], tools: list[Any]) -> list[int]:
    """transformers' ids; its `apply_chat_template` leaves out what is None, which R1's template needs to see."""
    if all(v["content"] is not None for v in views):
        return tokenizer.apply_chat_template(
            views, tools=tools, add_generation_prompt=True, return_dict=False, thinking=True
        )
    compiled = transformers.utils.chat_template_utils._compile_jinja_template(tokenizer.chat_template)
    text = compiled.render(messages=views, tools=tools, add_generation_prompt=True, **tokenizer.special_tokens_map)
    return tokenizer(text, add_special_tokens=False).input_ids


@pytest.mark.parametrize("name", FAMILIES)
def test_a_conversation_with_tools_has_the_ids_of_transformers(name: str) -> None:
    chat, call = family(name), replace(CALL, arguments={"text": "ä", "times": 2})
    talk = [Message("user", "ask"), Message("assistant", tool_calls=(call,)), Message("tool", "R1 {ä}", tool_call_id="call-0"),
            Message("assistant", "done"), Message("user", "more")]  # fmt: skip
    if name == "mistral-args" or name == "mistral":
        talk[1:3] = [
            replace(talk[1], tool_calls=(replace(call, id="0000call0"),)),
            replace(talk[2], tool_call_id="0000call0"),
        ]
    views = theirs(talk)
    for i, m in enumerate(talk):
        if m.role == "tool":
            views[i] |= {"name": "note", "tool_call_id": m.tool_call_id}
        if chat.found.form.written and m.tool_calls:
            views[i]["tool_calls"][0]["function"]["arguments"] = json.dumps(dict(call.arguments), ensure_ascii=False)
        if chat.found.form.no_content and m.tool_calls:
            views[i]["content"] = None
        if chat.found.form.parts:
            views[i]["content"] = [
                {"type": "text", "text": m.content, **({"name": "note"} if m.role == "tool" else {})}
            ]
    t = NOTE.spec
    offered = [
        {"type": "function", "function": {"name": t.name, "description": t.description, "parameters": t.parameters}}
    ]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder(name))
    for until in (1, 3, 5):
        want = ids_of(tokenizer, views[:until], offered)
        assert chat.render(talk[:until], [t], generate=True).ids == want
    assert chat.render([*talk[:-1], Message("user", "else")], [t], generate=True).ids != want  # the twin


# ------------------------------------------------------------------------------- the engine and the agent loop
def script(monkeypatch: pytest.MonkeyPatch, *turns: list[int]) -> None:
    """The engine's sampler draws these tokens: a turn is drawn from its first token on in each completion."""
    left = [list(t) for t in turns]

    def drawn(
        logits: torch.Tensor, settings: Any, index: torch.Tensor, steered: Any, sets: Any
    ) -> tuple[torch.Tensor, ...]:
        if int(index[0]) == 0 and drawn.begun:  # type: ignore[attr-defined]
            left.pop(0)
        drawn.begun = True  # type: ignore[attr-defined]
        zero = torch.zeros(len(logits))
        return torch.tensor([left[0].pop(0)]), zero, zero

    drawn.begun = False  # type: ignore[attr-defined]
    monkeypatch.setattr(writing, "sample", drawn)


def engine_of(chat: Chat) -> Engine:
    spec = spec_of("gqa/dense", tied=True).model_copy(update={"vocab_size": chat.vocab_size, "context_length": 2048})
    return Engine(noisy(spec).eval(), chat, max_rows=1, slots=2048)


def spelled(chat: Chat, text: str) -> list[int]:
    """A model's own tokens: tags where it has them, else one character a token."""
    found: list[int] = []
    while text:
        tag = next((t for t in getattr(chat, "_tag_ids", {}) if text.startswith(t)), None)
        found += chat.encode_text(text[0]) if tag is None else [chat._tag_ids[tag]]  # type: ignore[attr-defined]
        text = text[len(tag or text[0]) :]
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_a_call_stops_the_model_is_run_and_answered(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    chat, f = family(name), FAMILIES[name]
    call, _ = answer_of(chat, Message("assistant", tool_calls=(PLAIN,)))
    rambling = [*call[:-1], *chat.encode_text(" and on"), chat.end_id]  # the twin: it would go on after its call
    done = spelled(chat, "</think>all done" if name == "minimax-m2" else "all done")  # M2 thinks again after a result
    script(monkeypatch, rambling if chat.markers.tool_close else call, [*done, chat.end_id])
    model = EngineModel(engine_of(chat), chat)
    episode = asyncio.run(
        run_episode(model, [Message("user", "ask")], [NOTE], Sampling(max_tokens=400, answer_reserve=4))
    )
    assert [type(s) for s in episode.steps] == [ModelStep, ToolStep, ModelStep]
    one, two = episode.completions
    assert one.stop == (StopReason.TOOL_CALL if chat.markers.tool_close else StopReason.END)
    assert " and on" not in one.text and known(episode.messages[1].tool_calls) == [("note", {"text": "x"})]
    assert episode.final.content == "all done" and episode.stop == StopReason.END
    between = chat.decode(two.prompt_tokens[len(one.prompt_tokens) + len(one.tokens) :])
    assert between.count("noted 'x' 1 times") == 1 and "and on" not in between
    assert len(row(episode).ids) == len(two.prompt_tokens) + len(two.tokens)  # one row: nothing was tokenised again
    before_result = (one.text + between).partition("noted")[0]
    assert before_result.count(f.tags[0]) == 1  # the model's turn is closed once, whoever closed it


def test_without_tools_a_call_written_in_text_does_not_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    chat = family("minimax-m1")
    said = spelled(chat, '<tool_calls>\n{"name": "note", "arguments": {}}\n</tool_calls> so<end_of_sentence>')
    for tools, stop in (([], StopReason.END), ([NOTE.spec], StopReason.TOOL_CALL)):
        script(monkeypatch, said)
        message = asyncio.run(
            EngineModel(engine_of(chat), chat).complete([Message("user", "?")], tools, Sampling(max_tokens=200))
        )
        assert message.completion is not None and message.completion.stop == stop


# --------------------------------------------------------------------------------------------- malformed text
CHATS: dict[str, Callable[[], Chat]] = {
    "tiny": cache(tiny_chat),
    "bpe": cache(lambda: bpe_chat(["hello world, 12+3=15. Thinking helps. "] * 40, 400)),
    **{name: (lambda name=name: family(name)) for name in FAMILIES},
}
SCRAPS = ['{"name": "note", "arguments": {"text": "x"}}', '{"name": ', '"arguments": [', "{", "}", "[", "]", ",", '"name"',
          "<function=note>", "<parameter=text>", "</parameter>", "</function>", '<invoke name="note">', '<parameter name="text">',
          "</invoke>", "function", "note", "```json\n", "\n```", "\n", " ", "x", "<", "</", "<think", "tool_calls>", "null", "NaN",
          '"\\ud800"', "[" * 2000]  # fmt: skip


def tags_of(chat: Chat) -> list[str]:
    m = chat.markers
    tags = [*SCRAP_TAGS, *getattr(chat, "_tag_ids", {}), m.think_open, m.think_close, m.tool_open, m.tool_close, m.end]
    return [t for t in dict.fromkeys(tags) if t]


SCRAP_TAGS = ["<think>", "</think>", "<tool_call>", "</tool_call>"]


@pytest.mark.parametrize("name", CHATS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_whatever_a_model_writes_is_kept_and_streams_as_it_parses(name: str, data: st.DataObject) -> None:
    chat = CHATS[name]()
    written = st.sampled_from(
        [*tags_of(chat), *(SCRAPS if name != "tiny" else ["x", "{", "\n"]), *(["ä", "🙂"] if name != "tiny" else [])]
    )
    ids: list[int] = []
    for piece in data.draw(st.lists(written | st.integers(0, chat.vocab_size - 1), max_size=14)):
        ids += [piece] if isinstance(piece, int) else spelled(chat, piece)
    inside, tools = data.draw(st.booleans()), data.draw(st.sampled_from([(), (NOTE.spec,)]))
    whole = chat.parse(ids, inside, tools)
    splitter, events, at = chat.splitter(inside, tools), [], 0
    while at < len(ids):
        step = data.draw(st.integers(1, 9))
        events += splitter.push(ids[at : at + step])
        at += step
    events += splitter.finish()
    assert splitter.message() == whole
    said = {kind: "".join(e.text for e in events if e.kind == kind) for kind in ("reasoning", "text")}
    assert said == {"reasoning": whole.reasoning or "", "text": whole.content}
    assert [e.text for e in events if e.kind == "tool_call"] == [c.text for c in whole.tool_calls]
    assert all(c.error or c.name or name == "tiny" for c in whole.tool_calls)
    assert bare("".join(e.text for e in events), chat) == bare(chat.decode(ids), chat)


def bare(text: str, chat: Chat) -> str:
    """A text without tags, separators of calls and line breaks: nothing else may be lost."""
    text = re.sub("|".join(map(re.escape, sorted(tags_of(chat), key=len, reverse=True))), "", text)
    return "".join(c for c in text if c not in "[],\ufffd" and not c.isspace())


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_tag_that_is_no_token_is_found_however_it_is_cut(data: st.DataObject) -> None:
    chat = family("minimax-m1")
    pieces = data.draw(
        st.lists(st.sampled_from(["<tool_calls>", "</tool_calls>", "</think>", "<tool_", "a", "\n", "é🙂"]), max_size=8)
    )
    text = "<think>" * data.draw(st.booleans()) + "".join(pieces)
    whole = chat.parse(chat.encode_text(text))
    assert whole == chat.parse(spelled(chat, text))
    assert (whole.reasoning is not None) == text.startswith("<think>")


def test_a_tag_cut_in_two_would_be_lost_if_nothing_were_held_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin."""
    chat = family("minimax-m1")
    ids = spelled(chat, '<tool_calls>{"name": "note"}</tool_calls>')
    assert known(chat.parse(ids).tool_calls) == [("note", {})]
    monkeypatch.setattr("trivet.chat.split.longest_start", lambda text, wanted: 0)
    assert chat.parse(ids).tool_calls == ()


def test_sentencepiece_spaces_stream_too() -> None:
    """A decoder that drops a space at the beginning must not drop one in front of every piece."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    words = ["<unk>", "</s>", "<s>", "▁a", "▁quick", "▁fox", "[TOOL_CALLS]"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer.add_special_tokens(["</s>", "<s>", "[TOOL_CALLS]"])
    chat = TemplateChat(
        tokenizer, MISTRAL, family("mistral").markers.model_copy(update={"closing_message": ""}), {"eos_token": "</s>"}
    )
    events = chat.splitter().push([3, 4, 5])
    assert [e.text for e in events] == ["a", " quick", " fox"] and chat.parse([3, 4, 5]).content == "a quick fox"
    assert "".join(chat.decode([i]) for i in (3, 4, 5)) == "aquickfox"  # the twin: one by one they would be lost


JSONS = [("", "is empty"), ("{", "not valid JSON"), ("[]", "no call"), ("null", "no call"), ("3", 'with "name"'), ('{"name": 3}', 'with "name"'),
         ('{"name": ""}', "names no tool"), ('{"name": "a", "arguments": 3}', "one object"), ('{"name": "a", "args": {}}', "not 'args'"),
         ('{"name": "a", "name": "b"}', "twice"), ('{"name": "a", "arguments": {"x": NaN}}', "no JSON number"),
         ('{"name": "a", "arguments": {}, "parameters": {}}', "one object"), ('{"name": "a", "arguments": {"x": "\\ud800"}}', "surrogates"),
         ("[" * 5000, ""), ('{"name": "a"} tail', "not valid JSON")]  # fmt: skip
XMLS = [("", "is empty"), ("x", "no call"), ("<function=a>", "no call"), ("<function=></function>", "names no tool"),
        ("<function=a>x</function>", "no parameter: 'x'"), ("<function=a><parameter=x>1</function>", "no parameter"),
        ("<function=a><parameter=x>1</parameter><parameter=x>2</parameter></function>", "twice")]  # fmt: skip


@pytest.mark.parametrize(("syntax", "text", "says"), [*(("json", *c) for c in JSONS), *(("qwen-xml", *c) for c in XMLS),
    ("deepseek", "<｜tool▁call▁begin｜>function<｜tool▁sep｜>a\n```json\n{\n```<｜tool▁call▁end｜>", "not valid JSON"),
    ("deepseek-v3.1", "<｜tool▁call▁begin｜>a<｜tool▁sep｜>[]<｜tool▁call▁end｜>", "must be an object")])  # fmt: skip
def test_a_bad_call_says_what_is_wrong_and_keeps_its_text(syntax: Any, text: str, says: str) -> None:
    calls = read_calls(SYNTAXES[syntax], text)
    assert calls and calls[-1].error is not None and says in calls[-1].error
    assert (
        "".join(c.text for c in calls).replace(" ", "") == text.replace(" ", "").strip("[]" if text == "[]" else "")
        or text == "[]"
    )


def test_good_calls_beside_a_bad_one_are_calls() -> None:
    calls = read_calls(SYNTAXES["minimax-lines"], '{"name": "a"}\n{"name": "b", "arguments": {"x": 1}}\n{"name"', 2)
    assert known(calls) == [("a", {}), ("b", {"x": 1})] and [c.id for c in calls] == ["call-2", "call-3", "call-4"]
    assert calls[2].text == '{"name"'


def test_types_of_arguments_in_text_are_the_tools() -> None:
    block = "<function=note><parameter=text>5</parameter><parameter=times>5</parameter><parameter=loud>True</parameter></function>"
    assert known(read_calls(SYNTAXES["qwen-xml"], block, 0, [NOTE.spec])) == [
        ("note", {"text": "5", "times": 5, "loud": True})
    ]
    assert known(read_calls(SYNTAXES["qwen-xml"], block)) == [("note", {"text": "5", "times": "5", "loud": "True"})]
    wrong = read_calls(
        SYNTAXES["qwen-xml"],
        block.replace(">5</parameter><parameter=loud", ">five</parameter><parameter=loud"),
        0,
        [NOTE.spec],
    )
    assert wrong[0].arguments["times"] == "five" and NOTE.run(wrong[0].arguments).status == "error"


def test_an_answer_in_json_is_no_call_unless_it_reads_as_one() -> None:
    chat = family("llama-3.1")
    answer, call = '{"name": "Bob", "age": 3}', '\n{"name": "note", "parameters": {"text": "x"}}'
    assert chat.parse(chat.encode_text(answer), tools=[NOTE.spec]).content == answer
    assert known(chat.parse(chat.encode_text(call), tools=[NOTE.spec]).tool_calls) == [("note", {"text": "x"})]
    assert chat.parse(chat.encode_text(call)).tool_calls == ()  # no tool was offered
    assert chat.parse(chat.encode_text("So: " + call), tools=[NOTE.spec]).tool_calls == ()


# ------------------------------------------------------------------------------------------------- thinking
TALK = [Message("user", "one"), Message("assistant", "first", reasoning="old thought"), Message("user", "two"),
        Message("assistant", "", reasoning="loop thought", tool_calls=(PLAIN,)), Message("tool", "R", tool_call_id="call-1")]  # fmt: skip


@pytest.mark.parametrize(("name", "kept"), [("qwen3", ["loop thought"]), ("minimax-m2", ["loop thought"]),
                                            ("deepseek-r1", []), ("deepseek-v3.1", [])])  # fmt: skip
def test_earlier_thoughts_are_kept_as_the_template_keeps_them(name: str, kept: list[str]) -> None:
    chat = family(name)
    text = chat.decode(chat.render(TALK, generate=True).ids)
    assert [t for t in ("old thought", "loop thought") if t in text] == kept
    later = chat.decode(
        chat.render([*TALK, Message("assistant", "second"), Message("user", "three")], generate=True).ids
    )
    assert "thought" not in later and "second" in later and "first" in later


@pytest.mark.parametrize("name", FAMILIES)
def test_a_prompt_with_thinking_and_one_without(name: str) -> None:
    chat = family(name)
    on, off = (chat.decode(chat.render([Message("user", "?")], thinking=t, generate=True).ids) for t in (True, False))
    assert chat.thinking_open(chat.render([Message("user", "?")], generate=True).ids) == on.rstrip("\n").endswith(
        "<think>"
    )
    assert not off.rstrip("\n").endswith("<think>") and (on == off) == (chat.thinks == "never")


def test_a_budget_that_nothing_could_keep_is_refused() -> None:
    for name, f in FAMILIES.items():
        chat = family(name)
        request = Request(
            tuple(chat.render([Message("user", "?")], generate=True).ids), Sampling(thinking=5, answer_reserve=2)
        )
        if f.thinks != "never":
            assert engine_of(chat).add(request) >= 0
            continue
        for thinking in (5, 0, "off"):
            with pytest.raises(UserError, match="no thinking tags"):
                engine_of(chat).add(replace(request, sampling=replace(request.sampling, thinking=thinking)))
        assert engine_of(chat).add(replace(request, sampling=Sampling())) >= 0


SOFT = [
    (["hi /no_think"], 9, "off"), (["hi /think"], 9, 9), (["/no_think hi", "more"], None, "off"),
    (["a /no_think", "b /think"], 9, 9), (["a /think", "b /no_think"], 9, "off"), (["a /think /no_think"], 9, "off"),
    (["a /think"], "off", "off"), (["a/no_think", "path /no_think.txt", "/no_thinking"], 9, 9), ([], None, None),
]  # fmt: skip


@pytest.mark.parametrize(("said", "asked", "want"), SOFT)
def test_the_last_soft_switch_counts_and_a_hard_off_stays_off(said: list[str], asked: Any, want: Any) -> None:
    turns = [
        turn for text in said for turn in (Message("user", text), Message("assistant", "I /think so, or /no_think"))
    ]
    assert family("qwen3").thinking_for(turns, asked) == want
    assert tiny_chat().thinking_for(turns, asked) == want
    assert family("qwen3").thinking_for([Message("system", "/no_think"), *turns], asked) == (
        "off" if not any("/think" in s for s in said) else want
    )
    for name in ("deepseek-r1", "minimax-m2", "llama-3.1"):  # always or never: the words switch nothing
        assert family(name).thinking_for(turns, asked) == asked


def test_qwen3s_soft_switch_stays_in_the_prompt_and_shuts_the_thought() -> None:
    chat, talk = family("qwen3"), [Message("user", "hi /no_think")]
    text = chat.decode(chat.render(talk, thinking=chat.thinking_for(talk, None) != "off", generate=True).ids)
    assert text.endswith("hi /no_think<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n")
