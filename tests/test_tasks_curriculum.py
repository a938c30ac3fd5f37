"""Levels that rise with what was learned: by rule, in the saved state, and graded apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from test_rl_learner import CHAT, Digits, config, make
from trivet.config import UserError
from trivet.disk import Journal
from trivet.messages import Message
from trivet.rl import learner
from trivet.rl.learner import TIMES, learn
from trivet.tasks import Climber, Problem, make_task
from trivet.tasks.curriculum import Curriculum, Standing, advance
from trivet.train.loop import Interrupted

RULE = Curriculum(window=3, threshold=0.7)


def test_the_rule_by_hand() -> None:
    now = advance(RULE, (2, 4, 6), Standing(2), [(2, 1.0), (2, 0.0), (2, 1.0)])
    assert now == Standing(2, (1.0, 0.0, 1.0))  # 2 of 3 is below .7
    now = advance(RULE, (2, 4, 6), now, [(2, 1.0), (2, 0.5)])
    assert now == Standing(4)  # 1 and 1 and .5, the last three
    assert advance(RULE, (2, 4, 6), Standing(2, (0.0, 1.0)), [(2, 1.0), (2, 1.0), (2, 1.0), (4, 0.5)]) == Standing(
        4, (0.5,)
    )
    assert advance(RULE, (2, 4), Standing(4, (1.0, 1.0)), [(4, 1.0), (4, 1.0)]).level == 4  # there is no higher one
    results = [(2, 0.9), (2, 0.8), (4, 1.0), (2, 0.7), (4, 0.9), (4, 0.9), (4, 0.9), (6, 0.1)]
    whole = advance(RULE, (2, 4, 6), Standing(2), results)
    now = Standing(2)
    for one in results:  # in pieces, as steps bring them
        now = advance(RULE, (2, 4, 6), now, [one])
    assert now == whole == Standing(6, (0.1,))


def test_training_problems_come_from_the_level_and_test_problems_from_all() -> None:
    task = make_task({"name": "chain", "min_steps": 3, "max_steps": 6, "curriculum": {"window": 2, "threshold": 1.0}})
    assert isinstance(task, Climber)
    assert {task.problem("train", i).level for i in range(20)} == {3}
    assert {task.problem("test", i).level for i in range(20)} == {3, 4, 5, 6}
    task.adapt([(3, 1.0), (3, 1.0)])
    assert {task.problem("train", i).level for i in range(20)} == {4} and task.problem("train", 0, level=6).level == 6


def test_wrong_curricula_are_said() -> None:
    for settings, message in (
        ({"name": "search", "curriculum": True}, "needs several levels; it has 1"),
        ({"name": "chain", "curriculum": 3}, "must be true, false or a table"),
        ({"name": "chain", "curriculum": {"windw": 3}}, "Did you mean 'window'"),
        ({"name": "gym:leg_counting", "levels": 99}, "has 36 levels, not 99"),
        ({"name": "gym:leg_counting", "settings": {"legs": 3}}, "were refused"),
    ):
        with pytest.raises(UserError, match=message):
            make_task(settings)


class Steps(Digits):
    """Digits with levels; half a text of digits is right."""

    name, levels = "steps", (1, 2, 3, 4, 5, 6)

    def problem(self, split: str, index: int, level: int | None = None) -> Problem:
        return Problem(f"s{index}", f"{index % 97}+{level}=", "1", level or 1)

    def grade(self, problem: Problem, message: Message) -> Any:
        score = super().grade(problem, message)
        return type(score)(float(score.value > 0.1))


def run(out: Path, stop_at: int | None = None) -> list[dict[str, Any]]:
    """Six steps; with `stop_at` interrupted after that one and started again with new objects."""

    def interrupt(values: dict[str, Any]) -> None:
        if values["step"] == stop_at:
            raise KeyboardInterrupt

    settings = config(steps=6, save_every_seconds=0)
    for progress in [interrupt, None] if stop_at else [None]:
        try:
            task = Climber(Steps(), Curriculum(window=6, threshold=0.1))
            learn(make(noise=0.3), CHAT, [(task, 1.0)], settings, out, progress=progress)
        except Interrupted:
            pass
    return [{k: v for k, v in line.items() if k not in TIMES} for line in Journal(out / "metrics.jsonl").read()]


def test_a_curriculum_goes_on_where_a_run_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    straight = run(tmp_path / "straight")
    levels = [line["level/steps"] for line in straight]
    assert levels[0] == 1 and levels[-1] > 1 and levels == sorted(levels)
    assert run(tmp_path / "stopped", stop_at=4) == straight
    monkeypatch.setattr(learner, "set_standings", lambda tasks, saved: None)  # the twin
    assert run(tmp_path / "forgetful", stop_at=4) != straight


def test_reasoning_gyms_own_levels() -> None:
    gym = make_task({"name": "gym:chain_sum", "levels": 4, "seed": 3})
    easy, hard = gym.problem("train", 0, level=0), gym.problem("train", 0, level=3)
    assert len(hard.prompt) > len(easy.prompt) and hard.level == 3
    for problem in (easy, hard):
        assert gym.grade(problem, Message("assistant", problem.answer)).value == 1.0
        assert gym.grade(problem, Message("assistant", "no idea")).value < 0.5
    assert {gym.problem("test", i).level for i in range(8)} == {0, 1, 2, 3}


def test_a_scorer_that_evaluates_what_a_model_wrote_may_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    """Countdown's scorer gives the answer to sympy."""
    gym = make_task({"name": "gym:countdown"})
    problem = gym.problem("test", 0)
    assert gym.grade(problem, Message("assistant", problem.answer)).value == 1.0
    monkeypatch.setattr("trivet.tasks.gym.SECONDS", 0.5)
    assert gym.grade(problem, Message("assistant", "9**9**9**9")).status == "timeout"
