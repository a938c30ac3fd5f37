"""The last digit of a chain, left to right: `7+38-2*41=` is 3. Easy in steps, hard at a glance.

The thought writes one step a time, `7+38=5-2=3*41=3=`, and at the end the prompt's own `=`, so that every
step's continuation is copied from the prompt. Operands have one or two digits: if all were of one length, a
step's place in the prompt would follow from its place in the thought, and small models learn that table
instead of the rule, which ends with the longest example (docs/LOG.md). The thinking budget buys steps.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Literal

from pydantic import Field, model_validator

from trivet.messages import Message, Score
from trivet.spec import Frozen
from trivet.tasks.base import Demo, Problem, Split, draw

OPERATORS = "+-*"
LETTERS = str.maketrans("0123456789", "abcdefghij")


def apply(a: int, operator: str, b: int) -> int:
    return {"+": a + b, "-": a - b, "*": a * b}[operator] % 10


class ChainConfig(Frozen):
    name: Literal["chain"] = "chain"
    min_steps: int = Field(default=2, ge=1, description="operations in the shortest chain")
    max_steps: int = Field(default=9, ge=1, description="and in the longest")
    no_think: float = Field(default=0.10, ge=0, le=1, description="share of examples that answer without thinking")
    shown: int | None = Field(
        default=None,
        ge=1,
        description="most steps that an example works out; longer chains are cut before the next result",
    )
    cut: float = Field(default=0.12, ge=0, le=1, description="share cut at a random token, as a budget would")
    hasty: float = Field(default=0.0, ge=0, le=1, description="share that ends its thought too early by itself")
    letters: float = Field(default=0.0, ge=0, le=1, description="share of steps in another language: a..j for 0..9")
    seed: int = 0

    @model_validator(mode="after")
    def _ordered(self) -> ChainConfig:
        if self.max_steps < self.min_steps:
            raise ValueError(f"max_steps ({self.max_steps}) is below min_steps ({self.min_steps})")
        if self.no_think + self.cut + self.hasty > 1:
            raise ValueError("no_think, cut and hasty are shares of one whole: together at most 1")
        return self


class Chain:
    tools: tuple[str, ...] = ()

    def __init__(self, config: ChainConfig) -> None:
        self.config = config
        self.name: str = config.name
        self.levels = tuple(range(config.min_steps, config.max_steps + 1))

    def problem(self, split: Split, index: int, level: int | None = None) -> Problem:
        steps = self.levels[index % len(self.levels)] if level is None else level

        def make(rng: random.Random) -> tuple[str, tuple[tuple[str, ...], str]]:
            value = rng.randrange(10)
            text, thought = str(value), [str(value)]
            for _ in range(steps):
                operator = rng.choice(OPERATORS)
                operand = rng.randrange(10) if rng.random() < 0.5 else rng.randrange(10, 100)
                value = apply(value, operator, operand)
                text += f"{operator}{operand}"
                thought += [operator, *str(operand), f"={value}"]
            return text + "=", ((*thought, "="), str(value))

        text, (thought, answer) = draw(make, split, "chain", self.config.seed, index, steps)
        return Problem(f"chain-{split}-{index}", text, answer, steps, {"thought": thought})

    def demonstrate(self, problem: Problem, rng: random.Random) -> Demo:
        """Thinking, cut as a budget would cut it, or without any. Never works out more than `shown` steps."""
        user, thought = Message("user", problem.prompt), problem.meta["thought"]
        kind = rng.random()
        if self.config.letters:
            thought = mixed(thought, self.config.letters, rng)
        if kind < self.config.no_think:
            return Demo((user, Message("assistant", problem.answer)), thinking=False)
        results = [i for i, piece in enumerate(thought) if piece[0] == "=" and piece != "="]
        if self.config.shown is not None and problem.level > self.config.shown:
            kept = rng.randint(results[self.config.shown - 1] + 1, results[self.config.shown])
        elif kind < self.config.no_think + self.config.cut:
            kept = rng.randint(1, results[-1])
        elif kind < self.config.no_think + self.config.cut + self.config.hasty:
            early = "".join(thought[: rng.choice([0, *(r + 1 for r in results[:-1])])])
            return Demo((user, Message("assistant", problem.answer, early)))
        else:
            return Demo((user, Message("assistant", problem.answer, "".join(thought))))
        return Demo((user, Message("assistant", problem.answer, "".join(thought[:kept]), cut=True)))

    def grade(self, problem: Problem, message: Message) -> Score:
        return Score(float(message.content.strip() == problem.answer))


def mixed(thought: Sequence[str], share: float, rng: random.Random) -> list[str]:
    """The thought with a share of its steps, the start among them, in letters."""
    pieces, letters = [], rng.random() < share
    for piece in thought:
        if piece in OPERATORS:
            letters = rng.random() < share
        pieces.append(piece.translate(LETTERS) if letters else piece)
    return pieces
