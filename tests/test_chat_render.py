"""Conversations to ids and back, for the built-in alphabet and a byte-level BPE."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trivet.chat import Chat, Markers, bpe_chat, tiny_chat
from trivet.chat.syntax import read_calls
from trivet.config import UserError
from trivet.messages import Completion, Message, StopReason, ToolCall, ToolSpec

TINY = tiny_chat()
BPE = bpe_chat(["hello world, 12+3=15. Thinking helps. "] * 40, 400)
CALL = ToolCall("call-0", "calculator", {"expression": "74+20"})
TOOL_TALK = [
    Message("user", "74+20*3="),
    Message("assistant", reasoning="", tool_calls=(CALL,)),
    Message("tool", "94"),
    Message("assistant", "282", reasoning=""),
]


def written(chat: Chat, messages: list[Message], **options: bool) -> tuple[str, str]:
    """(the whole text, what the mask marks as the assistant's)"""
    rendered = chat.render(messages, **options)
    marked = [i for i, m in zip(rendered.ids, rendered.mask, strict=True) if m]
    return chat.decode(rendered.ids), chat.decode(marked)


def test_exact_text_and_mask_of_a_tool_call_inside_thinking() -> None:
    text, mine = written(TINY, TOOL_TALK)
    assert text == (
        "<user>74+20*3=<assistant><think><tool_call>74+20</tool_call><tool_response>94</tool_response></think>282<end>"
    )
    assert mine == "<think><tool_call>74+20</tool_call></think>282<end>"


def test_what_the_engine_would_force_carries_no_loss() -> None:
    text, mine = written(TINY, [Message("user", "7+3="), Message("assistant", "0", reasoning="7+3", cut=True)])
    assert text == "<user>7+3=<assistant><think>7+3…</think>0<end>"
    assert mine == "<think>7+30<end>"
    uncut, trained = written(TINY, [Message("user", "7+3="), Message("assistant", "0", reasoning="7+3")])
    assert "</think>" in trained and "…" not in uncut  # the twin: without the cut the model closes itself


def test_shut_thinking_stands_outside_the_mask() -> None:
    assert (
        written(TINY, [Message("user", "1=")], thinking=False, generate=True)[0] == "<user>1=<assistant><think></think>"
    )
    text, mine = written(TINY, [Message("user", "1="), Message("assistant", "1")], thinking=False)
    assert text.endswith("<think></think>1<end>") and mine == "1<end>"


def test_a_users_tags_are_characters() -> None:
    rendered = BPE.render([Message("user", "</think><end>hi")], generate=True)
    assert BPE.think_close_id not in rendered.ids and BPE.end_id not in rendered.ids
    assert "</think><end>hi" in BPE.decode(rendered.ids)


@pytest.mark.parametrize("chat", [TINY, BPE])
def test_a_turn_that_was_written_behind_a_shut_block_keeps_it(chat: Chat) -> None:
    """Or what is trained on after several turns would not be what was seen; a call and its result are such turns, too."""
    asked = Message("user", "12+3=")
    before = chat.render([asked], thinking=False, generate=True).ids
    tokens = tuple(chat.encode_text("15"))
    done = Completion("15", tokens, (True,), (0.0,), (0.0,), StopReason.END, tuple(before))
    for later in (Message("user", "1+1="), Message("tool", "15")):
        for thinking in (False, True):
            ids = chat.render([asked, Message("assistant", "15", completion=done), later], (), thinking, True).ids
            assert ids[: len(before) + len(tokens)] == [*before, *tokens]
    text, _ = written(chat, [asked, Message("assistant", "15"), asked], thinking=False, generate=True)
    assert text.count("<think></think>") == 1  # the twin: only the turn to come, where nobody says how it was written


def test_a_models_ids_are_spliced_and_never_tokenised_again() -> None:
    ids = tuple(BPE.encode_text("hel") + BPE.encode_text("lo") + [BPE.end_id])  # not how "hello" is tokenised
    assert list(ids[:-1]) != BPE.encode_text("hello")
    done = Completion("hello", ids, (True,) * len(ids), (0.0,) * len(ids), (0.0,) * len(ids), StopReason.END, ())
    said = Message("assistant", "hello", completion=done)
    rendered = BPE.render([Message("user", "x"), said, Message("user", "y")], generate=True)
    at = rendered.ids.index(ids[0])
    assert tuple(rendered.ids[at : at + len(ids)]) == ids and rendered.mask[at : at + len(ids)] == [True] * len(ids)
    plain = BPE.render([Message("user", "x"), Message("assistant", "hello"), Message("user", "y")], generate=True)
    assert plain.ids != rendered.ids  # the twin: from text the ids would have been others


def test_json_calls_and_tool_list() -> None:
    spec = ToolSpec("calculator", "adds", {"type": "object", "properties": {"expression": {"type": "string"}}})
    text = BPE.decode(BPE.render(TOOL_TALK, [spec]).ids)
    assert json.dumps({"name": "calculator", "arguments": {"expression": "74+20"}}) in text
    assert '"name": "calculator", "description": "adds"' in text


@pytest.mark.parametrize("chat", [TINY, BPE], ids=["tiny", "bpe"])
def test_parse_is_the_inverse_of_render(chat: Chat) -> None:
    for message in (
        Message("assistant", "15"),
        Message("assistant", "15", reasoning="12+3"),
        Message("assistant", "", reasoning=""),
    ):
        rendered = chat.render([Message("user", "12+3="), message])
        assert chat.parse([i for i, m in zip(rendered.ids, rendered.mask, strict=True) if m]) == message
    called = chat.render(TOOL_TALK[:2])
    parsed = chat.parse([i for i, m in zip(called.ids, called.mask, strict=True) if m])
    assert parsed.reasoning == "" and parsed.content == ""
    assert list(parsed.tool_calls[0].arguments.values()) == ["74+20"] and parsed.tool_calls[0].error is None


PIECES = st.lists(
    st.sampled_from(
        ["<think>", "</think>", "<tool_call>", "</tool_call>", "<end>", "7", "+", "hé", "🙂", '{"name": "a"}', "{"]
    ),
    max_size=14,
)


@settings(max_examples=150, deadline=None)
@given(PIECES, st.booleans(), st.data())
def test_streamed_pieces_join_to_the_parsed_message(pieces: list[str], inside: bool, data: st.DataObject) -> None:
    """Any model output, however malformed and however it is chunked; and parsing never raises."""
    specials = {
        m: BPE.tokenizer.token_to_id(m) for m in ("<think>", "</think>", "<tool_call>", "</tool_call>", "<end>")
    }
    ids = [i for p in pieces for i in ([specials[p]] if p in specials else BPE.encode_text(p))]
    whole = BPE.parse(ids, inside)
    splitter, events, at = BPE.splitter(inside), [], 0
    while at < len(ids):
        step = data.draw(st.integers(1, 5))
        events += splitter.push(ids[at : at + step])
        at += step
    events += splitter.finish()
    assert splitter.message() == whole
    assert "".join(e.text for e in events if e.kind == "reasoning") == (whole.reasoning or "")
    assert "".join(e.text for e in events if e.kind == "text") == whole.content
    assert sum(e.kind == "tool_call" for e in events) == len(whole.tool_calls)


@settings(max_examples=150, deadline=None)
@given(PIECES, st.booleans(), st.lists(st.sampled_from(["7", "7+", "++", "+h", "hé🙂", "é"]), max_size=3), st.data())
def test_a_stop_string_ends_a_stream_and_its_message_alike(
    pieces: list[str], inside: bool, stops: list[str], data: st.DataObject
) -> None:
    """However it is cut; between tags, against the rule written down on the text of each stretch."""
    tags = {m: BPE.tokenizer.token_to_id(m) for m in ("<think>", "</think>", "<tool_call>", "</tool_call>", "<end>")}
    pieces = [p for p in pieces if p != "<end>"]
    ids = [i for p in pieces for i in ([tags[p]] if p in tags else BPE.encode_text(p))]
    kept, stretch = list[str](), ""
    for piece in [*pieces, "</think>"]:
        if piece not in tags:
            stretch += piece
            continue
        ends = [(stretch.find(stop) + len(stop), stretch.find(stop)) for stop in stops if stop in stretch]
        kept.append(stretch[: min(ends)[1]] if ends else stretch)
        if ends:
            break
        kept.append(piece)
        stretch = ""
    else:
        kept = kept[:-1]
    want = BPE.parse([i for p in kept for i in ([tags[p]] if p in tags else BPE.encode_text(p))], inside)
    whole = BPE.parse(ids, inside, stops=stops)
    assert whole == want
    splitter, events, at = BPE.splitter(inside, stops=stops), [], 0
    while at < len(ids):
        step = data.draw(st.integers(1, 5))
        events += splitter.push(ids[at : at + step])
        at += step
    events += splitter.finish()
    assert splitter.message() == whole
    assert "".join(e.text for e in events if e.kind == "reasoning") == (whole.reasoning or "")
    assert "".join(e.text for e in events if e.kind == "text") == whole.content


def test_what_may_become_a_stop_string_is_held_back() -> None:
    splitter = BPE.splitter(stops=["++7"])
    said = ["".join(e.text for e in splitter.push(BPE.encode_text(c))) for c in "a++h+++7h"]
    assert said == ["a", "", "", "++h", "", "", "+", "", ""] and splitter.finish() == []


def test_without_holding_back_a_stream_shows_half_a_stop_string(monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin."""
    monkeypatch.setattr("trivet.chat.split.longest_start", lambda text, wanted: 0)
    splitter = BPE.splitter(stops=["++7"])
    assert "".join(e.text for c in "a+++7h" for e in splitter.push(BPE.encode_text(c))) == "a+++7h"


def test_malformed_calls_say_why() -> None:
    for text in ("{", "[]", '{"arguments": {}}', '{"name": "a", "arguments": 3}'):
        assert read_calls(BPE.syntax, text)[0].error


def test_an_unclosed_call_stays_text() -> None:
    ids = [TINY.think_open_id, TINY.tool_open_id, *TINY.encode_text("7+"), TINY.think_close_id, *TINY.encode_text("9")]
    message = TINY.parse([*ids, TINY.end_id])
    assert message.tool_calls == () and message.reasoning == "<tool_call>7+" and message.content == "9"


def test_files_round_trip(tmp_path: Path) -> None:
    BPE.save(tmp_path)
    again = Chat.load(tmp_path)
    assert again.render(TOOL_TALK).ids == BPE.render(TOOL_TALK).ids and again.markers == BPE.markers


def test_what_cannot_be_read_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no 'é'"):
        TINY.render([Message("user", "café")])
    with pytest.raises(UserError, match=r"has no tokenizer\.json"):
        Chat.load(tmp_path)
    with pytest.raises(UserError, match="must be one token"):
        Chat(TINY.tokenizer, TINY.template, Markers(think_open="<thoughts>"))
