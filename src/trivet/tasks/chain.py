"""Arithmetic mod 10, left to right: `7+3-2*4=` is 2. Easy in steps, hard at a glance.

The thought writes one step a time, `7+3=0-2=8*4=2=`: three tokens a step, and at the end the prompt's own `=`,
so that every step's continuation is copied from the prompt. The thinking budget buys steps, and accuracy
against budget is the share of chains that fit.
"""

from __future__ import annotations

import random
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
    shown: int | None = Field(
        default=None, ge=1, description="most results that an example works out; longer chains are cut before the next"
    )
    cut: float = Field(default=0.12, ge=0, le=1, description="share cut at a random token, as a budget would")
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
            value = rng.randrange(10)
            text = thought = str(value)
            for _ in range(steps):
                operator, digit = rng.choice(OPERATORS), rng.randrange(10)
                value = apply(value, operator, digit)
                text += f"{operator}{digit}"
                thought += f"{operator}{digit}={value}"
            return text + "=", (thought + "=", str(value))

        text, (thought, answer) = draw(make, split, "chain", self.config.seed, index, steps)
        return Problem(f"chain-{split}-{index}", text, answer, steps, {"thought": thought})

    def demonstrate(self, problem: Problem, rng: random.Random) -> Demo:
        user, thought = Message("user", problem.prompt), problem.meta["thought"]
        kind = rng.random()
        if kind < self.config.no_think:
            return Demo((user, Message("assistant", problem.answer)), thinking=False)
        longest = problem.level - 1 if self.config.shown is None else min(problem.level - 1, self.config.shown)
        too_long = self.config.shown is not None and problem.level > self.config.shown
        if too_long or kind < self.config.no_think + self.config.cut:
            steps, rest = divmod(rng.randrange(3 * longest + 3), 3)
            kept = 1 + 4 * steps + rest  # the start, whole steps such as "+3=0", and of the next no more than "+3"
            return Demo((user, Message("assistant", problem.answer, thought[:kept], cut=True)))
        return Demo((user, Message("assistant", problem.answer, thought)))

    def grade(self, problem: Problem, message: Message) -> Score:
        return Score(float(message.content.strip() == problem.answer))
