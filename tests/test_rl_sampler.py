"""Where a step's episodes come from: rounds until every group teaches something."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from test_rl_learner import CHAT, Digits, config, make
from trivet.messages import Message, Score
from trivet.rl.learner import learn
from trivet.rl.sampler import Batch, Sampler, spread
from trivet.tasks import Problem


class HalfSolved(Digits):
    """Every second problem is solved by whatever one writes, so its group has no spread."""

    name = "half"

    def grade(self, problem: Problem, message: Message) -> Score:
        return Score(1.0) if int(problem.id[1:]) % 2 else super().grade(problem, message)


class Solved(Digits):
    name = "solved"

    def grade(self, problem: Problem, message: Message) -> Score:
        return Score(1.0)


def sample(step: int, task: Any = None, **changes: Any) -> Batch:
    settings = config(problems=6, group=4, **changes)
    return Sampler(make(noise=0.3), CHAT, [(task or HalfSolved(), 1.0)], settings, "cpu").sample(step)


def facts(batch: Batch) -> list[Any]:
    return [(a.job.problem, a.job.sampling.seed, a.episode.completions[0].tokens, a.score) for a in batch.attempts]


# ------------------------------------------------------------------------------------ dynamic sampling
def test_groups_without_spread_are_replaced_until_the_batch_is_full() -> None:
    for step in range(3):
        batch, once = sample(step, dynamic=8), sample(step)
        teaches = spread(batch.attempts, 4)
        assert int(teaches.sum()) == 6 and len(teaches) == batch.counts["drawn"] > 6
        assert 2 <= batch.counts["rounds"] <= 8
        ids = [a.job.problem.id for a in batch.attempts[::4]]
        assert len(set(ids)) == len(ids)  # a replacement is another problem
        assert len({a.job.sampling.seed for a in batch.attempts}) == len(batch.attempts)
        assert facts(batch)[:24] == facts(once)  # the first round is what it would be alone
        assert int(spread(once.attempts, 4).sum()) < 6 and not once.counts  # the twin: without rounds it is not full
        # What is over at the end is nothing: the last group drawn is one that teaches.
        assert bool(teaches[-1])


def test_thoughts_leave_the_answer_its_reserve() -> None:
    """Without a budget a thought may take what max_tokens leaves beside closing message and reserve."""
    longest = {}
    for reserve in (0, 16):
        batch = sample(0, max_tokens=30, answer_reserve=reserve)
        longest[reserve] = max(a.episode.reasoning_tokens for a in batch.attempts)
        assert longest[reserve] <= 30 - len(CHAT.closing_ids) - reserve
    assert longest[0] > longest[16] > 0


def test_rounds_are_a_pure_function_of_the_step() -> None:
    again, other = sample(1, dynamic=4), sample(2, dynamic=4)
    assert facts(sample(1, dynamic=4)) == facts(again) != facts(other)


def test_rounds_end() -> None:
    batch = sample(0, Solved(), dynamic=3)
    assert batch.counts == {"rounds": 3, "drawn": 18} and not spread(batch.attempts, 4).any()


def test_what_was_replaced_is_counted(tmp_path: Path) -> None:
    """Metrics are of all that was drawn; what is trained on is the full batch."""
    logged: dict[str, dict[str, Any]] = {}
    for name, rounds in (("once", 1), ("more", 8)):
        settings = config(steps=1, problems=6, dynamic=rounds)
        logged[name] = learn(make(noise=0.3), CHAT, [(HalfSolved(), 1.0)], settings, tmp_path / name)
    once, more = logged["once"], logged["more"]
    assert more["drawn"] == round(6 / (1 - more["no_spread"])) and more["no_spread"] > 0
    assert more["trained_share"] * more["drawn"] == pytest.approx(6) and once["trained_share"] < 1
    assert "rounds" not in once
