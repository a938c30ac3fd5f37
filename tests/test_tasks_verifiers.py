"""Environments of the `verifiers` package: with the real one where it is installed, and what is ours without it.

Tests with `real` load verifiers_envs.py by the package itself, in a worker. The others have a stand-in for the worker:
a game in a few lines that keeps `messages.World`'s contract.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from test_agent_loop import CHAT, Scripted
from test_rl_learner import config
from test_rl_learner import make as make_model
from trivet.agent.loop import Episode, ModelStep, ReplyStep, ToolStep, row, run_episode
from trivet.config import UserError
from trivet.disk import Journal
from trivet.engine import Engine
from trivet.measure.evaluate import evaluate
from trivet.messages import Message, Sampling, Score, StopReason, ToolCall
from trivet.rl.learner import learn
from trivet.rl.page import LINES
from trivet.rl.rollout import Job, grade
from trivet.rl.rollout import play as play_jobs
from trivet.tasks import make_task, verifiers
from trivet.tasks.apart import call_apart
from trivet.tasks.verifiers import Verifiers, message, plain

real = pytest.mark.skipif(find_spec("verifiers") is None, reason="verifiers is not installed (trivet[verifiers])")


def make(kind: str, **more: Any) -> Any:
    return make_task({"name": "verifiers:verifiers-envs", "path": "tests", "args": {"kind": kind}, **more})


def talk(problem: Any, *turns: Message) -> list[Message]:
    """What a model sees and says when it says these turns; ends where the environment does."""
    transcript = problem.messages
    for turn in turns:
        transcript.append(turn)
        said = problem.world.reply(transcript)
        assert not isinstance(said, Score), said
        transcript += said
    return transcript


def say(text: str, *calls: ToolCall) -> Message:
    return Message("assistant", text, tool_calls=calls)


# -------------------------------------------------------------------------------- with the real package
@real
def test_rows_are_problems_and_the_rubric_is_the_score() -> None:
    task = make("single", args={"kind": "single", "rows": 7})
    problems = [task.problem("train", i) for i in range(7)]
    assert sorted(p.answer for p in problems) == [str(i) for i in range(1, 8)]  # a lap has every row once
    assert [p.answer for p in problems] != [task.problem("train", i + 7).answer for i in range(7)]
    assert [task.problem("test", i).answer for i in range(5)] == ["1001", "1002", "1003", "1004", "1001"]
    problem = problems[0]
    assert [m.role for m in problem.messages] == ["system", "user", "assistant", "user"]
    assert problem.messages[0].content == "Answer with a number." and problem.messages[-1].content == problem.prompt
    number = int(problem.answer) - 1
    full = task.grade(problem, say(problem.answer))  # 1 x right + 0.5 x near + 0 x everything, by hand
    assert full.ok and full.value == 1 + 0.5 * 1 / 2 and full.parts["near"] == 0.5 and full.parts["everything"] == 1
    assert task.grade(problem, say(str(number))).value == 0.5
    assert task.grade(problem, say(str(number + 4))).value == 0.5 * 1 / 5
    assert task.demonstrate(problem, None).messages[-1].content == problem.answer


@real
@pytest.mark.parametrize(
    ("kind", "text", "status", "detail"),
    [
        ("broken", "5", "error", "broken: KeyError: "),  # verifiers itself says 0.0
        ("no_number", "5", "error", "no_number: ValueError: not a finite number: nan"),
        ("sleeps", "zzz", "timeout", "no answer in 1 s"),
        ("sleeps", "5", "ok", ""),
        ("dies", "5", "error", "exit code 3"),
        ("broken_metric", "5", "ok", "broken: KeyError"),
    ],
)
def test_what_fails_is_no_0(kind: str, text: str, status: str, detail: str) -> None:
    task = make(kind, seconds=1)
    score = task.grade(task.problem("train", 0), say(text))
    assert (score.status, detail in score.detail) == (status, True), score
    assert "broken" not in score.parts


@real
@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("group", "its compares compares several episodes"),
        ("mixture", "it is a group: give each"),
        ("own_rollout", "it has a rollout of its own"),
        ("what", "can't be loaded: .*'what'"),
        ("picture", "a message holds image_url, and only text"),
        ("no_question", "row 0 of train does not end with a user's message"),
        ("own_tools", "rows with tools of their own"),
    ],
)
def test_what_does_not_fit_is_refused(kind: str, why: str) -> None:
    with pytest.raises(UserError, match=why):
        make(kind)


@real
def test_an_environment_that_is_not_there_is_refused() -> None:
    with pytest.raises(UserError, match="verifiers:no-such-env can't be loaded"):
        make_task({"name": "verifiers:no-such-env"})


@real
def test_it_talks_over_several_turns_and_scores_its_own_state() -> None:
    task = make("hidden")
    problem = task.problem("test", 0)  # 1001
    whole = talk(problem, say("500"), say("2000"), say("1001"))
    assert [m.content for m in whole[1:]] == ["500", "more", "2000", "less", "1001"]
    score = problem.world.grade(whole)
    assert score.ok and score.value == 1 and score.parts["guesses"] == 2
    never = talk(problem, say("1"), say("1"), say("1"), say("1"))
    assert never[-1].role == "assistant"  # its max_turns is 4
    assert problem.world.grade(never).value == 0
    early = problem.world.grade(talk(problem, say("1"))[:-1])  # cut where the environment would have gone on
    assert early.ok and early.value == 0
    assert problem.world.grade([*whole[:2], Message("user", "less"), *whole[3:]]).status == "error"  # never said


@real
def test_an_environment_that_changes_its_mind_is_an_error() -> None:
    problem = make("moody").problem("test", 0)
    one = [*problem.messages, say("1")]
    said = problem.world.reply(one)
    again = problem.world.reply([*one, *said, say("1")])
    assert isinstance(again, Score) and again.status == "error" and "does not say what it said" in again.detail
    assert problem.world.grade([*one, *said, say("1001")]).status == "error"


@real
def test_its_tools_are_told_and_called() -> None:
    task = make("tools")
    problem = task.problem("test", 0)
    (spec,) = problem.world.specs
    assert (spec.name, spec.description) == ("add", "Add two numbers.")
    assert set(spec.parameters["properties"]) == {"a", "b"}
    calls = (ToolCall("1", "add", {"a": 1000, "b": 1}), ToolCall("2", "add", {"a": "x"}))
    whole = talk(problem, say("", *calls), say("1001"))
    results = [m for m in whole if m.role == "tool"]
    assert [m.tool_call_id for m in results] == ["1", "2"] and results[0].content == "1001"
    assert "argument" in results[1].content  # Python's own words
    assert problem.world.grade(whole).value == 1
    bad = ToolCall("1", "", {}, error="no JSON", text="{a:")
    assert talk(problem, say("", bad))[-1].role == "tool"


@real
def test_one_data_set_is_divided_and_thoughts_are_shown_to_a_parser_of_thoughts() -> None:
    task = make("one_set")
    train = {task.problem("train", i).prompt for i in range(40)}
    test = {task.problem("test", i).prompt for i in range(40)}
    assert train and test and not train & test and len(train | test) == 40
    thought, given = Message("assistant", "1001", "well"), make("thinks")
    assert given.grade(given.problem("test", 0), thought).value == 1
    hidden = make("thinks", thoughts=False)
    assert hidden.grade(hidden.problem("test", 0), thought).value == 0  # the twin: its parser wants </think>


@real
def test_rl_learns_from_it_and_evaluation_asks_it(tmp_path: Path) -> None:
    """A score is what the environment's function gives to the text that was written, by hand."""
    task, model = make("digits", args={"kind": "digits", "rows": 64}), make_model(noise=0.02)
    told = learn(model, CHAT, [(task, 1.0)], config(problems=2, length=120), tmp_path)
    assert told["not_ok"] == 0 and 0 < told["reward"] < 1 and told["grad_norm"] > 0
    problems = [task.problem("test", i) for i in range(4)]
    jobs = [Job(task, p, Sampling(max_tokens=8, thinking="off", seed=i)) for i, p in enumerate(problems)]
    for attempt in play_jobs(Engine(model.eval(), CHAT, 4, 128), jobs, 8):
        text = attempt.episode.final.content
        assert attempt.score.value == pytest.approx(sum(c.isdigit() for c in text) / max(len(text), 6))
    result = evaluate(model, CHAT, task, count=4, sampling=Sampling(max_tokens=8, thinking="off"))
    assert result.task == "verifiers:verifiers-envs" and result.statuses == {"ok": 4}


# ----------------------------------------------------------------------------------- without the package
def game(function: str, what: str, *given: Any, seconds: float) -> Any:
    """A stand-in for the worker: rows of 8 sums; `add` is a tool; whoever says "?" is told to go on, once."""
    if what == "describe":
        for name, first in (("train", 0), ("eval", 90)):
            prompt = [
                [plain(Message("system", "Add."), False), plain(Message("user", f"{i}+1="), False)]
                for i in range(first, first + 8)
            ]
            lines = [json.dumps({"row": i, "prompt": p, "answer": str(i + 1)}) for i, p in enumerate(prompt)]
            Path(given[0], name).write_text("\n".join(lines))
        tool = {"name": "add", "description": "Add.", "parameters": {"type": "object", "properties": {}}}
        return {"tools": [tool], "turns": -1, "thoughts": False}
    _, _, turns = given
    last = turns[-1]
    if what == "grade":
        return Score(float(last["content"] == "1"), parts={"turns": len(turns)})
    if last["content"] == "!":
        return Score(0.0, "timeout", detail="too slow")
    if last["calls"]:
        return [plain(Message("tool", "4", tool_call_id=c["id"]), False) for c in last["calls"]]
    return [plain(Message("user", "9+9="), False)] if last["content"] == "2" else []


@pytest.fixture
def task(monkeypatch: pytest.MonkeyPatch) -> Verifiers:
    monkeypatch.setattr(verifiers, "call_apart", game)
    made = make_task({"name": "verifiers:game"})
    assert isinstance(made, Verifiers)
    return made


def play(task: Verifiers, *turns: str) -> Episode:
    problem = task.problem("test", 0)
    return asyncio.run(run_episode(Scripted(*turns), problem.messages, [], Sampling(max_tokens=100), 8, problem.world))


def score(task: Verifiers, episode: Episode) -> Score:
    return grade(Job(task, task.problem("test", 0), Sampling()), episode)


def test_the_loop_hands_back_what_a_world_says(task: Verifiers) -> None:
    episode = play(task, "<think></think>2<end>", "<think></think>1<end>")
    assert [type(step) for step in episode.steps] == [ModelStep, ReplyStep, ModelStep]
    assert [m.role for m in episode.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert episode.stop == StopReason.END and score(task, episode) == Score(1.0, parts={"turns": 5})
    example = row(episode)
    seen = CHAT.decode([i for i, t in zip(example.ids, example.trained, strict=True) if not t])
    assert "9+9=" in seen  # a reply is nobody's to learn
    called = play(task, "<think><tool_call>1+2</tool_call>", "</think>1<end>")
    assert [type(step) for step in called.steps] == [ModelStep, ToolStep, ModelStep]
    assert score(task, called).parts["turns"] == 5


def test_a_world_that_fails_is_a_status_and_no_score_of_what_was_said(task: Verifiers) -> None:
    episode = play(task, "<think></think>!<end>")
    assert episode.stop == StopReason.ERROR and score(task, episode) == Score(0.0, "timeout", detail="too slow")
    cut = play(task, "<think></think>1")
    assert cut.stop == StopReason.LENGTH and score(task, cut).value == 1.0  # the twin: an episode that was only cut


@pytest.mark.parametrize("partial", [1.0, 0.5])
def test_rl_learns_from_several_turns(partial: float, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every episode is told to go on once; what is said then is in its row, and nobody's to learn. Carried, too."""

    def twice(function: str, what: str, *given: Any, seconds: float) -> Any:
        said = [turn["content"] for turn in given[-1] if turn["role"] == "assistant"] if what != "describe" else []
        if what == "reply":
            return [plain(Message("user", "9+9="), False)] if len(said) == 1 else []
        if what == "grade":
            text = "".join(said)
            return Score(sum(c.isdigit() for c in text) / max(len(text), 6))
        return game(function, what, *given, seconds=seconds)

    monkeypatch.setattr(verifiers, "call_apart", twice)
    asked = config(steps=3, length=100, max_tokens=60, thinking="off", page_every=1, partial=partial)
    told = learn(make_model(noise=0.05), CHAT, [(make_task({"name": "verifiers:game"}), 1.0)], asked, tmp_path)
    assert told["not_ok"] == 0 and told["ratio/max_abs_log"] == 0 and told["mismatch/kl"] < 1e-6
    lines = Journal(tmp_path / LINES).read()
    replies = ["".join(p for p, k in zip(line["text"], line["kinds"], strict=True) if k == "t") for line in lines]
    assert sum("9+9=" in reply for reply in replies) > 3 and "" in replies  # some ended before they came to it


def test_settings_of_the_task(task: Verifiers) -> None:
    assert task.name == "verifiers:game" and task.tools == ("add",)
    with pytest.raises(UserError, match="no worked examples"):
        task.demonstrate(task.problem("train", 0), None)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="Did you mean 'args'"):
        make_task({"name": "verifiers:game", "arg": {}})
    with pytest.raises(UserError, match="'env' is missing"):
        make_task({"name": "verifiers"})


@pytest.mark.skipif(find_spec("verifiers") is not None, reason="verifiers is installed")
def test_without_the_package_the_command_is_said() -> None:
    with pytest.raises(UserError, match=r"pip install 'trivet\[verifiers\]'"):
        make_task({"name": "verifiers:game"})


@pytest.mark.parametrize(
    "turn",
    [
        Message("user", "7"),
        Message("tool", "4", tool_call_id="call-1"),
        Message("assistant", "", "so", (ToolCall("call-1", "add", {"a": 1}),)),
    ],
)
def test_messages_cross_as_they_are(turn: Message) -> None:
    assert message(json.loads(json.dumps(plain(turn, False)))) == turn


# ---------------------------------------------------------------------------------------- functions made
def adder(first: int, others: Sequence[int]) -> Any:
    if first < 0:
        raise UserError("no negative numbers")
    return lambda number: {"sum": first + sum(others) + number}


def test_a_worker_keeps_what_a_maker_made() -> None:
    assert call_apart(f"{__name__}:adder [1, [2, 3]]", 4) == {"sum": 10}
    assert call_apart(f"{__name__}:adder [10, []]", 4) == {"sum": 14}
    failed = call_apart(f"{__name__}:adder [1, []]", "x")
    assert isinstance(failed, Score) and "TypeError" in failed.detail
    with pytest.raises(UserError, match="no negative numbers"):
        call_apart(f"{__name__}:adder [-1, []]", 4)
