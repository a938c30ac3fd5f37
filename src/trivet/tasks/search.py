"""Guess and check: `8?1?7?5=9` asks for three operators (mod 10, left to right): `8-1+7-5`.

The thought tries operators in random order, `8+1=9*7=3*5=5~9x` (result, target, wrong) until one hits
(`y`), and the answer copies it. Each attempt succeeds with a small chance and finding the answer is
then free, so accuracy against budget is the true curve of test-time search.
"""

from __future__ import annotations

import itertools
import random
import re
from typing import Literal

from pydantic import Field

from trivet.messages import Message, Score
from trivet.spec import Frozen
from trivet.tasks.base import Demo, Problem, Split, draw
from trivet.tasks.chain import OPERATORS, apply


class SearchConfig(Frozen):
    name: Literal["search"] = "search"
    no_think: float = Field(default=0.07, ge=0, le=1, description="share of examples that answer without thinking")
    cut: float = Field(default=0.10, ge=0, le=1, description="share cut after some attempts, as a budget would")
    seed: int = 0


class Search:
    tools: tuple[str, ...] = ()
    levels: tuple[int, ...] = (3,)

    def __init__(self, config: SearchConfig) -> None:
        self.config = config
        self.name: str = config.name

    def problem(self, split: Split, index: int, level: int | None = None) -> Problem:
        def make(rng: random.Random) -> tuple[str, tuple[list[int], int]]:
            digits = [rng.randrange(10) for _ in range(4)]
            target = evaluate(digits, [rng.choice(OPERATORS) for _ in range(3)])
            return "?".join(map(str, digits)) + f"={target}", (digits, target)

        text, (digits, target) = draw(make, split, "search", self.config.seed, index)
        solutions = [ops for ops in itertools.product(OPERATORS, repeat=3) if evaluate(digits, ops) == target]
        answer = written(digits, solutions[0])
        return Problem(f"search-{split}-{index}", text, answer, 3, {"digits": digits, "target": target})

    def demonstrate(self, problem: Problem, rng: random.Random) -> Demo:
        user = Message("user", problem.prompt)
        digits, target = problem.meta["digits"], problem.meta["target"]
        order = list(itertools.product(OPERATORS, repeat=3))
        rng.shuffle(order)
        hit = next(i for i, ops in enumerate(order) if evaluate(digits, ops) == target)
        answer = written(digits, order[hit])
        kind = rng.random()
        if kind < self.config.no_think:
            return Demo((user, Message("assistant", answer)), thinking=False)
        tries = [attempt(digits, ops, target) for ops in order[: hit + 1]]
        if kind < self.config.no_think + self.config.cut and hit > 0:
            kept = rng.randint(1, min(hit, 12))
            return Demo((user, Message("assistant", answer, "".join(tries[:kept]), cut=True)))
        return Demo((user, Message("assistant", answer, "".join(tries))))

    def grade(self, problem: Problem, message: Message) -> Score:
        """Any operators that hit the target between the given digits are right."""
        found = re.fullmatch(r"(\d)([-+*])(\d)([-+*])(\d)([-+*])(\d)", message.content.strip())
        if found is None:
            return Score(0.0, detail="not four digits with operators between them")
        digits, operators = [int(d) for d in found.group(1, 3, 5, 7)], found.group(2, 4, 6)
        right = digits == problem.meta["digits"] and evaluate(digits, operators) == problem.meta["target"]
        return Score(float(right))


def evaluate(digits: list[int], operators: tuple[str, ...] | list[str]) -> int:
    value = digits[0]
    for operator, digit in zip(operators, digits[1:], strict=True):
        value = apply(value, operator, digit)
    return value


def written(digits: list[int], operators: tuple[str, ...]) -> str:
    return str(digits[0]) + "".join(f"{o}{d}" for o, d in zip(operators, digits[1:], strict=True))


def attempt(digits: list[int], operators: tuple[str, ...], target: int) -> str:
    value, text = digits[0], str(digits[0])
    for operator, digit in zip(operators, digits[1:], strict=True):
        value = apply(value, operator, digit)
        text += f"{operator}{digit}={value}"
    return text + f"~{target}" + ("y" if value == target else "x")
