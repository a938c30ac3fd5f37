"""Conversations to imitate: which tokens get a loss under each mode, and lines that can't be used."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from trivet.chat import Chat, bpe_chat, tiny_chat
from trivet.config import UserError
from trivet.messages import Message
from trivet.tasks import make_task
from trivet.train.data import TaskDocuments

TALK = [{"role": "user", "content": "2+2="}, {"role": "assistant", "reasoning": "2+2=4", "content": "4"}]


def write(path: Path, *lines: dict[str, Any]) -> str:
    """The lines, often enough for both splits; questions differ."""
    texts = []
    for i in range(40):
        for line in lines:
            first, *rest = line["messages"]
            texts.append(json.dumps({**line, "messages": [{**first, "content": f"{i}: {first['content']}"}, *rest]}))
    path.write_text("\n".join(texts) + "\n")
    return str(path)


def learnt(chat: Chat, path: str, **settings: Any) -> tuple[str, str]:
    """A document's text, and what of it has a loss."""
    task = make_task({"name": "conversations", "path": path, **settings})
    document = TaskDocuments(task, chat)[0]
    ids = [i for i, wanted in zip(document.ids, document.mask, strict=True) if wanted]
    return chat.decode(document.ids).split(": ", 1)[1], chat.decode(ids)


@pytest.mark.parametrize(
    ("mode", "text", "loss"),
    [  # the table of tasks/conversations.py
        ("think", "2+2=<assistant><think>2+2=4</think>4<end>", "<think>2+2=4</think>4<end>"),
        ("no_think", "2+2=<assistant><think></think>4<end>", "4<end>"),
        ("keep", "2+2=<assistant><think>2+2=4</think>4<end>", "4<end>"),
    ],
)
def test_which_tokens_get_a_loss(mode: str, text: str, loss: str, tmp_path: Path) -> None:
    path = write(tmp_path / "talk.jsonl", {"messages": TALK, "mode": mode})
    assert learnt(tiny_chat(), path) == (text, loss)
    path = write(tmp_path / "plain.jsonl", {"messages": TALK})
    assert learnt(tiny_chat(), path, mode=mode) == (text, loss)  # the stage's word for all lines


def test_without_a_mode_the_last_turn_says(tmp_path: Path) -> None:
    assert learnt(tiny_chat(), write(tmp_path / "a.jsonl", {"messages": TALK}))[1].startswith("<think>2+2=4")
    bare = [TALK[0], {"role": "assistant", "content": "4"}]
    path = write(tmp_path / "b.jsonl", {"messages": bare})
    assert learnt(tiny_chat(), path) == ("2+2=<assistant><think></think>4<end>", "4<end>")
    assert learnt(tiny_chat(), path, mode="keep")[1] == "4<end>"
    with pytest.raises(UserError, match="no reasoning"):
        learnt(tiny_chat(), path, mode="think")


def test_training_renders_as_serving_does(tmp_path: Path) -> None:
    """What stands before the first token with a loss is the prompt that chat, evaluation and RL begin with."""
    chat = tiny_chat()
    for mode, thinking in (("think", True), ("no_think", False)):
        task = make_task({"name": "conversations", "path": write(tmp_path / mode, {"messages": TALK}), "mode": mode})
        document = TaskDocuments(task, chat)[0]
        served = chat.render([Message("user", task.problem("train", 0).prompt)], thinking=thinking, generate=True).ids
        assert document.ids[: document.mask.index(True)] == served


def test_tool_calls_in_either_spelling_and_thoughts_of_every_turn(tmp_path: Path) -> None:
    def talk(call: dict[str, Any]) -> list[dict[str, Any]]:
        return [
            {"role": "user", "content": "7*8="},
            {"role": "assistant", "reasoning": "hm", "tool_calls": [call]},
            {"role": "tool", "content": "56", "tool_call_id": "call-0"},
            {"role": "assistant", "reasoning": "so", "content": "56"},
        ]

    chat = bpe_chat(["7*8=56 calculator expression hm so"], 300)
    short = {"name": "calculator", "arguments": {"expression": "7*8"}}
    long = {"id": "x", "type": "function", "function": {"name": "calculator", "arguments": '{"expression": "7*8"}'}}
    settings = {"name": "conversations", "tools": ["calculator"]}
    found = []
    from trivet.tools import get_tool

    for i, call in enumerate((short, long)):
        path = write(tmp_path / f"{i}.jsonl", {"messages": talk(call)})
        for mode in ("think", "keep"):
            task = make_task({**settings, "path": path, "mode": mode})
            document = TaskDocuments(task, chat, tools=[get_tool("calculator").spec])[0]
            found.append(chat.decode([t for t, m in zip(document.ids, document.mask, strict=True) if m]))
    assert found[0] == found[2] and found[1] == found[3]
    assert "hm" in found[0] and "7*8" in found[0] and "56" in found[0].rpartition("</tool_call>")[2]
    assert "so" not in found[1] and found[1].endswith("56<end>")


def test_lines_that_can_not_be_used_are_named(tmp_path: Path) -> None:
    path = tmp_path / "talk.jsonl"
    good = Path(write(path, {"messages": TALK})).read_text().splitlines()
    cases = {
        '{"messages": [{"role": "user"': "line 1: ",
        json.dumps({"messages": [TALK[0], {"role": "robot", "content": ""}]}): "role",
        json.dumps({"messages": TALK[::-1]}): "last message is not the assistant's",
        json.dumps({"messages": TALK, "mode": "thinks"}): "Did you mean 'think'",
        json.dumps({"messages": [TALK[0], {**TALK[1], "contnt": "4"}]}): "contnt",
    }
    for line, says in cases.items():
        path.write_text("\n".join([line, *good]))
        with pytest.raises(UserError, match="1 of 41 lines can't be used") as e:
            make_task({"name": "conversations", "path": str(path)})
        assert says in str(e.value)
        with pytest.warns(UserWarning, match="1 of 41 lines"):
            make_task({"name": "conversations", "path": str(path), "bad_share": 0.1})
    with pytest.raises(UserError, match="can't be read"):
        make_task({"name": "conversations", "path": str(tmp_path / "none")})


def test_they_have_no_grade(tmp_path: Path) -> None:
    task = make_task({"name": "conversations", "path": write(tmp_path / "talk.jsonl", {"messages": TALK})})
    with pytest.raises(UserError, match="imitated, not graded"):
        task.grade(task.problem("train", 0), Message("assistant", "4"))


def test_laps_see_every_line_once(tmp_path: Path) -> None:
    task = make_task({"name": "conversations", "path": write(tmp_path / "talk.jsonl", {"messages": TALK})})
    count = len(task.lines["train"])  # type: ignore[attr-defined]
    for lap in range(2):
        assert len({task.problem("train", lap * count + i).prompt for i in range(count)}) == count
    assert random.Random(0).random() < 1
