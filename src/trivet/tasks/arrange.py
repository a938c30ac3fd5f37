"""A matter of taste: `~39142` asks for three of these digits in an order that reads well. Nothing is right or wrong.

People, so the story goes, like digits that rise: an answer is worth the share of neighbours that do, and 0 where it has
digits that were not given, or not three. Training never sees this number, only which of two answers somebody liked
better; it stands for whatever a reward model is to learn, and tells afterwards what the policy is really worth.
"""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Literal

from pydantic import Field

from trivet.messages import Message, Score
from trivet.spec import Frozen
from trivet.tasks.base import Demo, Problem, Split, draw


class ArrangeConfig(Frozen):
    name: Literal["arrange"] = "arrange"
    digits: int = Field(default=5, ge=2, description="how many are given")
    pick: int = Field(default=3, ge=2, description="how many are to be written")
    no_think: float = Field(default=0.5, ge=0, le=1, description="share of examples that answer with the block shut")
    seed: int = 0


class Arrange:
    tools: tuple[str, ...] = ()
    levels: tuple[int, ...] = (0,)

    def __init__(self, config: ArrangeConfig) -> None:
        self.config = config
        self.name: str = config.name

    def problem(self, split: Split, index: int, level: int | None = None) -> Problem:
        def make(rng: random.Random) -> tuple[str, str]:
            text = "".join(str(rng.randrange(10)) for _ in range(self.config.digits))
            return "~" + text, text

        prompt, text = draw(make, split, "arrange", self.config.seed, index)
        return Problem(f"arrange-{split}-{index}", prompt, "".join(sorted(text)))

    def demonstrate(self, problem: Problem, rng: random.Random) -> Demo:
        """Any of them in any order: how to answer, not what is liked."""
        digits = [rng.choice(problem.answer) for _ in range(self.config.pick)]
        thinking = rng.random() >= self.config.no_think
        answer = Message("assistant", "".join(digits), "" if thinking else None)
        return Demo((Message("user", problem.prompt), answer), thinking=thinking)

    def grade(self, problem: Problem, message: Message) -> Score:
        text = message.content.strip()
        if len(text) != self.config.pick or set(text) - set(problem.answer):
            return Score(0.0, detail=f"not {self.config.pick} of the given digits")
        return Score(sum(a < b for a, b in pairwise(text)) / (len(text) - 1))
