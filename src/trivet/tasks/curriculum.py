"""A task that gets harder as it is learned: `curriculum = true`, or a table, in the task's own table.

    level k is drawn until the mean over its last `window` groups reaches `threshold`; then k + 1

Where a task stands is a pure function of what its groups scored, in order (`advance`): the learner hands it the
scores after each step and keeps the standing in its saved state, so a run that was killed goes on as it would have.
Test problems, and so evaluation, are those of all levels. Left out: falling back, and mixing in what is easier.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import Field

from trivet.config import UserError
from trivet.messages import Message, Score
from trivet.spec import Frozen
from trivet.tasks.base import Demo, Problem, Split, Task


class Curriculum(Frozen):
    window: int = Field(default=64, gt=0, description="groups of the level that are looked at")
    threshold: float = Field(
        default=0.8, gt=0, le=1, description="mean accuracy of these at which the next level begins"
    )


@dataclass(frozen=True)
class Standing:
    """The level that is drawn, and the accuracy of its latest groups."""

    level: int
    recent: tuple[float, ...] = ()


def advance(rule: Curriculum, levels: Sequence[int], now: Standing, results: Sequence[tuple[int, float]]) -> Standing:
    """The standing after groups of (level, accuracy). Groups of a level that was left don't count."""
    for level, accuracy in results:
        if level != now.level:
            continue
        now = Standing(level, (*now.recent, accuracy)[-rule.window :])
        at = levels.index(level)
        if len(now.recent) == rule.window and sum(now.recent) >= rule.threshold * rule.window and at + 1 < len(levels):
            now = Standing(levels[at + 1])
    return now


class Climber:
    """A task at the level where it stands."""

    def __init__(self, task: Task, rule: Curriculum) -> None:
        if len(task.levels) < 2:
            raise UserError(f"A curriculum for {task.name!r} needs several levels; it has {len(task.levels)}.")
        self.task, self.rule = task, rule
        self.name, self.tools, self.levels = task.name, task.tools, task.levels
        self.standing = Standing(task.levels[0])

    def problem(self, split: Split, index: int, level: int | None = None) -> Problem:
        if split == "train" and level is None:
            level = self.standing.level
        return self.task.problem(split, index, level)

    def demonstrate(self, problem: Problem, rng: random.Random) -> Demo:
        return self.task.demonstrate(problem, rng)

    def grade(self, problem: Problem, message: Message) -> Score:
        return self.task.grade(problem, message)

    def adapt(self, results: Sequence[tuple[int, float]]) -> None:
        """Take in what the groups of a step scored: (level, accuracy), in order."""
        self.standing = advance(self.rule, self.levels, self.standing, results)
