"""Arithmetic mod 10, left to right, every step with a label: `7f+3g-2h*4=` is 2. Easy in steps, hard at a glance.

The thought writes one step at a time, `7f+3=0g-2=8h*4=2`: four tokens a step. So the thinking budget buys
steps, and accuracy against budget is the share of chains that fit. Labels run through the alphabet from
a random letter on. With them a step is found by what it is called, not by how far away it stands: without
labels a small model learns positions, and a chain one step longer than any it was shown is noise to it,
which leaves reinforcement learning nothing to reinforce (docs/LOG.md).
"""

from __future__ import annotations

import random
from string import ascii_lowercase as LABELS
from typing import Literal

from pydantic import Field, model_validator

from trivet.messages import Message, Score
from trivet.spec import Frozen
from trivet.tasks.base import Demo, Problem, Split, draw

OPERATORS = "+-*"


def apply(a: int, operator: str, b: int) -> int:
    return {"+": a + b, "-": a - b, "*": a * b}[operator] % 10


class ChainConfig(Frozen):
    name: Literal["chain"] = "chain"
    min_steps: int = Field(default=2, ge=1, description="operations in the shortest chain")
    max_steps: int = Field(default=9, ge=1, description="and in the longest")
    no_think: float = Field(default=0.10, ge=0, le=1, description="share of examples that answer without thinking")
    cut: float = Field(default=0.12, ge=0, le=1, description="share cut at a random step, as a budget would")
    seed: int = 0

    @model_validator(mode="after")
    def _ordered(self) -> ChainConfig:
        if self.max_steps < self.min_steps:
            raise ValueError(f"max_steps ({self.max_steps}) is below min_steps ({self.min_steps})")
        return self


class Chain:
    tools: tuple[str, ...] = ()

    def __init__(self, config: ChainConfig) -> None:
        self.config = config
        self.name: str = config.name
        self.levels = tuple(range(config.min_steps, config.max_steps + 1))

    def problem(self, split: Split, index: int, level: int | None = None) -> Problem:
        steps = self.levels[index % len(self.levels)] if level is None else level

        def make(rng: random.Random) -> tuple[str, tuple[str, str]]:
            value, first = rng.randrange(10), rng.randrange(len(LABELS))
            label = [LABELS[(first + i) % len(LABELS)] for i in range(steps + 1)]
            start, thought, lines = f"{value}{label[0]}:", str(value), [f"{label[steps]}="]
            for i in range(steps):
                line = f"{label[i]}{rng.choice(OPERATORS)}{rng.randrange(10)}"
                value = apply(value, line[1], int(line[2]))
                lines.append(line)
                thought += f"{line}={value}"
            rng.shuffle(lines)
            return start + "".join(lines), (thought, str(value))

        text, (thought, answer) = draw(make, split, "chain", self.config.seed, index, steps)
        return Problem(f"chain-{split}-{index}", text, answer, steps, {"thought": thought})

    def demonstrate(self, problem: Problem, rng: random.Random) -> Demo:
        user, thought = Message("user", problem.prompt), problem.meta["thought"]
        kind = rng.random()
        if kind < self.config.no_think:
            return Demo((user, Message("assistant", problem.answer)), thinking=False)
        if kind < self.config.no_think + self.config.cut:
            kept = 1 + 5 * rng.randrange(problem.level)  # the start, then whole steps such as "f+3=0"
            return Demo((user, Message("assistant", problem.answer, thought[:kept], cut=True)))
        return Demo((user, Message("assistant", problem.answer, thought)))

    def grade(self, problem: Problem, message: Message) -> Score:
        return Score(float(message.content.strip() == problem.answer))
