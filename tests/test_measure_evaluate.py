"""Evaluation: the numbers are of the attempts, the same every time, and nothing is counted as wrong that was not graded."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from test_rl_learner import CHAT, Broken, Calls, Digits, eager_caller, make
from trivet.config import UserError
from trivet.measure.evaluate import budget_sweep, evaluate
from trivet.measure.results import Result
from trivet.measure.stats import wilson
from trivet.messages import Message, Sampling, Score
from trivet.model import Transformer
from trivet.tasks import Problem


class Parity(Digits):
    """Right with the odd and the even problems told apart, whatever was written."""

    name, levels = "parity", (0, 1)

    def problem(self, split: str, index: int, level: int | None = None) -> Problem:
        return Problem(f"p{index}", f"{index % 90}?", "x", index % 2 if level is None else level)

    def grade(self, problem: Problem, message: Message) -> Score:
        if int(problem.id[1:]) % 10 == 0:
            return Score(0.0, "timeout")
        return Score(float(problem.level == 1))


class Sevens(Digits):
    """Right if the first character written is one of half the alphabet."""

    name = "sevens"

    def grade(self, problem: Problem, message: Message) -> Score:
        return Score(float(message.content[:1] > "h"))


T1 = Sampling(temperature=1.0, max_tokens=6)


def same(a: Result, b: Result) -> bool:
    return a.model_copy(update={"tokens_per_second": 0}) == b.model_copy(update={"tokens_per_second": 0})


def test_accuracy_interval_levels_and_statuses_by_hand() -> None:
    result = evaluate(make(), CHAT, Parity(), count=100, sampling=T1)  # type: ignore[arg-type]
    assert result.statuses == {"ok": 90, "timeout": 10}  # 0, 10, .. 90 time out, all of them even
    assert result.accuracy.mean == pytest.approx(50 / 90) and result.accuracy.count == 90
    assert (result.accuracy.low, result.accuracy.high) == wilson(50, 90)
    assert result.by_level[0].mean == 0 and result.by_level[1].mean == 1 and result.by_level[0].count == 40
    assert evaluate(make(), CHAT, Parity(), count=9, level=1, sampling=T1).accuracy.mean == 1  # type: ignore[arg-type]
    assert len(result.samples) == 6 and result.samples[0].score is None and result.samples[1].score is not None


def test_same_arguments_same_numbers() -> None:
    def point(seed: int) -> Result:
        return evaluate(make(noise=0.3), CHAT, Sevens(), count=60, n=3, sampling=T1, seed=seed)  # type: ignore[arg-type]

    assert same(point(1), point(1)) and not same(point(1), point(2))


def test_many_answers_a_question() -> None:
    result = evaluate(make(noise=0.3), CHAT, Sevens(), count=40, n=6, sampling=T1)  # type: ignore[arg-type]
    assert set(result.pass_at) == set(result.maj_at) == {1, 2, 4, 6}
    assert result.pass_at[1] == pytest.approx(result.accuracy.mean) == pytest.approx(result.maj_at[1])
    assert result.pass_at[1] < result.pass_at[2] < result.pass_at[6] <= 1
    assert result.accuracy.low < result.accuracy.mean < result.accuracy.high and result.accuracy.count == 240
    greedy = evaluate(make(noise=0.3), CHAT, Sevens(), count=40, n=2, sampling=Sampling(temperature=0, max_tokens=6))  # type: ignore[arg-type]
    assert greedy.pass_at[2] == greedy.pass_at[1]  # the twin: equal answers gain nothing


def test_budgets_and_tools_reach_the_engine() -> None:
    model = eager_caller()
    sampling = Sampling(temperature=1.0, max_tokens=40)
    off, two, free = budget_sweep(model, CHAT, Calls(), ["off", 2, None], sampling=sampling, count=60)  # type: ignore[arg-type]
    assert off.mean_reasoning_tokens == 0 and 0 < two.mean_reasoning_tokens <= 2
    assert free.mean_reasoning_tokens > two.mean_reasoning_tokens and two.budget_hit > 0.1
    assert free.calls_tool > 0 and free.tools
    without = evaluate(model, CHAT, Calls(), count=60, sampling=sampling, tools=False)  # type: ignore[arg-type]
    assert without.calls_tool == 0 and not without.tools
    assert free.truncated > 0  # most of its answers never end


def test_a_task_that_can_not_be_graded_is_an_error() -> None:
    class Never(Broken):
        def grade(self, problem: Problem, message: Message) -> Score:
            raise ZeroDivisionError("always")

    with pytest.raises(UserError, match=r"(?s)Not one answer.*always"):
        evaluate(make(), CHAT, Never(), count=5, sampling=T1)  # type: ignore[arg-type]


def test_evaluation_leaves_the_model_as_it_was() -> None:
    model: Transformer = make(noise=0.3).train()
    before: dict[str, Any] = {k: v.clone() for k, v in model.state_dict().items()}
    evaluate(model, CHAT, Digits(), count=8, sampling=T1)  # type: ignore[arg-type]
    assert model.training and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(not p.is_inference() for p in model.parameters())
