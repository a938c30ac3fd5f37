"""Reward terms by hand, what they add up to, and that one which fails is never a 0."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from test_rl_learner import CHAT, Digits, config, make
from trivet.agent.loop import Episode, ModelStep, ToolStep
from trivet.config import UserError
from trivet.messages import Completion, Message, Sampling, Score, StopReason, ToolCall, ToolSpec
from trivet.rl.judge import JudgeConfig, judge_term, question
from trivet.rl.learner import learn
from trivet.rl.rewards import TERMS, Reward, add_rewards, make_rewards, rewards_of
from trivet.rl.terms import Case, OverlongConfig, overlong, words
from trivet.tasks import Problem
from trivet.tools import ToolResult

PROBLEM = Problem("p", "What is {answer}?", "4")


def case(
    answer: str = "4", thought: str | None = None, tokens: Sequence[int] = (), reasoning: int = 0, calls: str = ""
) -> Case:
    """One turn; `calls`: o for a call that went well, e for one that failed, before it."""
    done = Completion(
        answer, tuple(tokens), (True,) * len(tokens), (), (), StopReason.END, (), reasoning_tokens=reasoning
    )
    call = ToolCall("c", "f", {})
    steps = [ToolStep(call, ToolResult("", "ok" if kind == "o" else "error")) for kind in calls]
    message = Message("assistant", answer, thought, completion=done)
    return Case(PROBLEM, Episode((), (*steps, ModelStep(message)), StopReason.END))


def value(name: str, given: Case, **settings: Any) -> float:
    (reward,) = make_rewards([{"name": name, "weight": 1.0, **settings}])
    (score,) = reward.term([given])
    assert score.ok, score
    return score.value


@pytest.mark.parametrize(
    ("settings", "given", "expected"),
    [
        ({}, case("4"), 1), ({}, case("  "), 0),
        ({"thought": True}, case("4", "2+2"), 1), ({"thought": True}, case("4"), 0), ({"thought": True}, case("4", " "), 0),
        ({"thought": True}, case("", "a thought that was never closed"), 0),
        ({"pattern": r"-?\d+"}, case("-4"), 1), ({"pattern": r"-?\d+"}, case("It is 4"), 0),
        ({"tags": ["think", "answer"]}, case("<think>a < b\n</think>\n<answer>4</answer>\n"), 1),
        ({"tags": ["think", "answer"]}, case("<answer>4</answer><think>a</think>"), 0),
        ({"tags": ["think", "answer"]}, case("<think>a</think><answer>4</answer><answer>5</answer>"), 0),
        ({"tags": ["think", "answer"]}, case("<think>a<answer>4</answer>"), 0),
        ({"tags": ["think", "answer"]}, case("<think></think><answer>4</answer>"), 0),
        ({"tags": ["answer"]}, case("so <answer>4</answer>"), 0),
    ],
)  # fmt: skip
def test_format(settings: dict[str, Any], given: Case, expected: float) -> None:
    assert value("format", given, **settings) == expected


def test_language_is_r1s_share_of_words(tmp_path: Path) -> None:
    mixed = case("所以答案是 four", "we add 二")  # 5 + 1 characters of Han, and we, add, four
    assert value("language", mixed, script="han") == pytest.approx(6 / 9)
    assert value("language", mixed, script="latin", of="thinking") == pytest.approx(2 / 3)
    assert (
        value("language", case("Ответ: четыре"), script="cyrillic") == 1
        and value("language", case("42"), script="han") == 1
    )
    assert (
        value("language", case("答案是 $\\frac{x}{2}$ `print(word)`"), script="han") == 1
    )  # code and LaTeX are no words
    assert (
        value("language", case("日本語です"), script="japanese") == 1
        and value("language", case("日本語です"), script="han") == 0.6
    )
    assert [w for _, w in words("It's naïve, don’t: x y 東京")] == ["It's", "naïve", "don’t", "東", "京"]
    (tmp_path / "de").write_text("die\nAntwort\nist\n")
    german = case("Die Antwort is vier")
    assert value("language", german, script="latin") == 1
    assert value("language", german, script="latin", words=str(tmp_path / "de")) == 0.5


def test_overlong_is_dapos_formula() -> None:
    lengths = {0: 0.0, 16_384: 0.0, 16_385: -1 / 4096, 18_432: -0.5, 20_480: -1.0, 20_481: -1.0, 10**6: -1.0}
    assert {n: overlong(n, 20_480, 4_096) for n in lengths} == lengths
    assert value("overlong", case(tokens=range(9)), limit=10, cache=4) == -0.75
    with pytest.raises(ValueError, match="more than limit"):
        OverlongConfig(limit=3, cache=4)


def test_alphabet() -> None:
    assert value("alphabet", case("4", "7+3= b"), characters="0123456789+=") == 0.8
    assert value("alphabet", case("b", "7+3"), characters="0123456789+=") == 1  # of the thought alone
    assert value("alphabet", case("b", ""), characters="1") == 1


def test_length_and_repetition() -> None:
    assert value("length", case(tokens=range(10), reasoning=6), limit=20) == -0.5
    assert value("length", case(tokens=range(10), reasoning=6), limit=20, of="thinking") == pytest.approx(-0.3)
    assert value("length", case(tokens=range(10), reasoning=6), limit=2, of="answer") == -1
    assert value("repetition", case(tokens=(1, 2, 3, 1, 2, 3, 1)), n=2) == -0.5  # 12 23 31 12 23 31
    assert value("repetition", case(tokens=range(50)), n=2) == 0 and value("repetition", case(tokens=(1, 1)), n=3) == 0


def test_schema() -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    for text, right in (
        ('{"n": 4}', 1),
        ('```json\n{"n": 4}\n```', 1),
        ('{"n": "4"}', 0),
        ("{}", 0),
        ("n is 4", 0),
        ("[" * 10**5, 0),
    ):
        assert value("schema", case(text), schema=schema) == right, text
    with pytest.raises(UserError, match="the schema itself is wrong"):
        make_rewards([{"name": "schema", "weight": 1, "schema": {"type": "objekt"}}])


def test_tools() -> None:
    assert [value("tools", case(calls=c)) for c in ("", "o", "oe", "e")] == [0, 1, 0.5, 0]
    assert [value("tools", case(calls=c), least=0, most=1) for c in ("", "o", "oo")] == [1, 1, 0]


def test_every_term_stays_in_its_range_and_can_differ() -> None:
    cases = [
        case(), case("", "unclosed"), case("a b c " * 30, "t", tokens=[1, 2] * 40, reasoning=30, calls="oeo"),
        case("所以", tokens=range(300)),
    ]  # fmt: skip
    settings: dict[str, dict[str, Any]] = {
        "language": {"script": "latin"}, "length": {"limit": 100}, "overlong": {"limit": 100, "cache": 50},
        "schema": {"schema": {"type": "integer"}}, "repetition": {"n": 3}, "alphabet": {"characters": "abc", "of": "all"},
    }  # fmt: skip
    for name in TERMS:
        (reward,) = make_rewards([{"name": name, "weight": 1.0, **settings.get(name, {})}])
        values = [score.value for score in reward.term(cases)]
        low, high = (-1, 0) if name in ("length", "overlong", "repetition") else (0, 1)
        assert all(low <= v <= high for v in values) and len(set(values)) > 1, name


# ------------------------------------------------------------------------------------------- adding up
def term(*scores: Score) -> Reward:
    return Reward("extra", 0.5, lambda cases: scores[: len(cases)])


def test_a_term_for_some_tasks_and_one_in_place_of_the_grade() -> None:
    made = make_rewards(
        [
            {"name": "format", "weight": 0.1, "tasks": ["chain"]},
            {"name": "alphabet", "weight": 0.5, "characters": "1", "instead": True, "tasks": ["arrange"]},
        ]
    )
    assert [[r.label for r in rewards_of(made, task)] for task in ("chain", "arrange", "search")] == [
        ["format"], ["alphabet"], [],
    ]  # fmt: skip
    (plain,) = add_rewards([case("2", "11")], [Score(1.0)], rewards_of(made, "chain"))
    (instead,) = add_rewards([case("2", "11")], [Score(1.0)], rewards_of(made, "arrange"))
    assert plain.value == pytest.approx(1.1) and instead.value == 0.5
    assert instead.parts == {"task": 1.0, "alphabet": 1.0}  # the grade is still there to be watched
    with pytest.raises(UserError, match="tasks must be a list"):
        make_rewards([{"name": "format", "weight": 0.1, "tasks": "chain"}])


def test_terms_are_added_and_kept_apart() -> None:
    rewards = (*make_rewards([{"name": "format", "weight": 0.1}]), term(Score(-1.0), Score(1.0)))
    one, two = add_rewards([case(), case("")], [Score(1.0, parts={"tests": 1.0}), Score(0.0)], rewards)
    assert one == Score(1.0 + 0.1 - 0.5, parts={"task": 1.0, "tests": 1.0, "format": 1.0, "extra": -1.0})
    assert two == Score(0.5, parts={"task": 0.0, "format": 0.0, "extra": 1.0})
    assert add_rewards([case()], [Score(1.0)], ()) == [Score(1.0)]


@pytest.mark.parametrize("status", ["unparsed", "timeout", "error"])
def test_a_term_that_fails_is_a_status(status: Any) -> None:
    lost, kept = add_rewards(
        [case(), case()], [Score(1.0), Score(1.0)], (term(Score(0.0, status, detail="why"), Score(1.0)),)
    )
    assert (lost.status, lost.value, lost.detail) == (status, 0.0, "reward 'extra': why") and kept.value == 1.5
    raised = add_rewards([case()], [Score(1.0)], (Reward("bad", 1.0, lambda cases: [Score(1 / 0)]),))
    assert raised[0].status == "error" and "ZeroDivisionError" in raised[0].detail
    few = add_rewards([case(), case()], [Score(1.0)] * 2, (Reward("few", 1.0, lambda cases: [Score(1.0)]),))
    assert {s.status for s in few} == {"error"}


def test_what_the_task_could_not_grade_is_not_asked_about() -> None:
    seen: list[int] = []
    spy = Reward("spy", 1.0, lambda cases: [seen.append(len(cases)) or Score(1.0) for _ in cases])
    scores = add_rewards([case(), case()], [Score(0.0, "timeout"), Score(1.0)], (spy,))
    assert seen == [1] and [s.status for s in scores] == ["timeout", "ok"]


def test_tables_are_read_strictly() -> None:
    for table, message in (
        ({"name": "formt", "weight": 1}, "Did you mean 'format'"),
        ({"name": "format"}, "weight must be a number, not None"),
        ({"name": "length", "weight": 1}, "'limit' is missing"),
        ({"name": "language", "weight": 1, "script": "elvish"}, "no script 'elvish'"),
        ({"name": "format", "weight": 1, "pattern": "("}, "no regular expression"),
        ({"name": "format", "weight": 1, "label": "task"}, "that one is taken"),
    ):
        with pytest.raises(UserError, match=message):
            make_rewards([table])
    with pytest.raises(UserError, match="that one is taken"):
        make_rewards([{"name": "format", "weight": 1}] * 2)
    twice = make_rewards(
        [{"name": "format", "weight": 1}, {"name": "format", "weight": 2, "label": "tags", "tags": ["answer"]}]
    )
    assert [r.label for r in twice] == ["format", "tags"]


# --------------------------------------------------------------------------------------------- a judge
class Judge:
    """Answers with the next of some lines."""

    def __init__(self, *lines: str | Exception) -> None:
        self.lines, self.asked = list(lines), []

    async def complete(self, messages: Sequence[Message], tools: Sequence[ToolSpec], sampling: Sampling) -> Message:
        self.asked.append(messages[0].content)
        line = self.lines[len(self.asked) - 1]
        if isinstance(line, Exception):
            raise line
        return Message("assistant", line)


def test_a_judges_scores_and_failures() -> None:
    model = Judge(
        "Good.\nScore: 10", "score 1, no:\n**Score:** 5.5", "It is fine.", "Score: 11", ConnectionError("gone")
    )
    settings = JudgeConfig(model="none")
    scores = judge_term(settings, model)([case(f"answer {i}") for i in range(5)])
    assert [(s.status, s.value) for s in scores] == [
        ("ok", 1.0),
        ("ok", 0.5),
        ("unparsed", 0.0),
        ("unparsed", 0.0),
        ("error", 0.0),
    ]
    assert "no score" in scores[2].detail and "outside" in scores[3].detail and "gone" in scores[4].detail
    assert "answer 3" in model.asked[3] and "<reference>\n4\n" in model.asked[3]


def test_braces_in_what_a_model_wrote_are_not_filled_in() -> None:
    text = question(JudgeConfig(model="none"), case("my {reference}"))
    assert "my {reference}" in text and "What is {answer}?" in text


def test_a_judges_settings_are_checked() -> None:
    for settings, message in (
        ({"low": 3.0, "high": 3.0}, "below"),
        ({"template": "rate"}, "never shows"),
        ({"pattern": r"\d"}, "no group"),
    ):
        with pytest.raises(ValueError, match=message):
            JudgeConfig(model="none", **settings)


# ------------------------------------------------------------------------------------------ in training
def test_rl_learns_from_terms_and_reports_them(tmp_path: Path) -> None:
    rewards = make_rewards([{"name": "length", "weight": 0.5, "limit": 8}])
    last = learn(make(), CHAT, [(Digits(), 1.0)], config(steps=1), tmp_path, rewards=rewards)
    assert -1 <= last["reward/length"] < 0 and last["reward/task"] > 0
    assert math.isclose(last["reward"], last["reward/task"] + 0.5 * last["reward/length"], abs_tol=1e-9)
    plain = learn(make(), CHAT, [(Digits(), 1.0)], config(steps=1), tmp_path / "plain")
    assert plain["reward"] == last["reward/task"] and "reward/length" not in plain


def test_a_term_that_fails_often_stops_the_run(tmp_path: Path) -> None:
    silent = (Reward("judge", 1.0, lambda cases: [Score(0.0, "unparsed", detail="wrote no score")] * len(cases)),)
    with pytest.raises(UserError, match=r"could not be graded \(16 unparsed\).*reward 'judge': wrote no score"):
        learn(make(), CHAT, [(Digits(), 1.0)], config(steps=1), tmp_path, rewards=silent)


def test_a_run_goes_on_with_the_rewards_it_began_with(tmp_path: Path) -> None:
    rewards = make_rewards([{"name": "length", "weight": 0.5, "limit": 8}])
    learn(make(), CHAT, [(Digits(), 1.0)], config(steps=1), tmp_path, rewards=rewards)
    with pytest.raises(UserError, match="rewards"):
        learn(make(), CHAT, [(Digits(), 1.0)], config(steps=1), tmp_path)
