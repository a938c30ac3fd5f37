"""Find the number by asking: `37..52?` hides one, and the tool says `<`, `>` or `=` to each guess.

Nothing in the prompt tells the number, so one call after another is the only way to it: level k hides it among 2^k
numbers and allows k guesses, with which halving always succeeds and guessing at random seldom does. Worked examples
do both, so RL has to find out which pays. The tool is made for one problem and one episode: it counts guesses.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Literal

from pydantic import Field, model_validator

from trivet.messages import Message, Score, ToolCall
from trivet.spec import Frozen
from trivet.tasks.base import Demo, Problem, Split, draw
from trivet.tools import Tool, ToolFailure

LARGEST = 999


class HuntConfig(Frozen):
    name: Literal["hunt"] = "hunt"
    levels: tuple[int, ...] = Field(default=(2, 3, 4), description="guesses allowed, k among 2^k numbers")
    blind: float = Field(default=0.5, ge=0, le=1, description="share of examples that guess at random")
    seed: int = 0

    @model_validator(mode="after")
    def _fits(self) -> HuntConfig:
        if not self.levels or not all(1 <= level <= 6 for level in self.levels):
            raise ValueError(f"levels are from 1 to 6 (2 to 64 of the numbers to {LARGEST}), not {self.levels}")
        return self


class Hunt:
    tools: tuple[str, ...] = ("guess",)

    def __init__(self, config: HuntConfig) -> None:
        self.config = config
        self.name: str = config.name
        self.levels = tuple(sorted(set(config.levels)))

    def problem(self, split: Split, index: int, level: int | None = None) -> Problem:
        drawn = self.config.levels
        tries = drawn[index % len(drawn)] if level is None else level

        def make(rng: random.Random) -> tuple[str, tuple[int, int, int]]:
            low = rng.randrange(LARGEST + 2 - 2**tries)
            high = low + 2**tries - 1
            return f"{low}..{high}?", (low, high, rng.randint(low, high))

        text, (low, high, secret) = draw(make, split, "hunt", self.config.seed, index, tries)
        return Problem(
            f"hunt-{split}-{index}", text, str(secret), tries, {"low": low, "high": high},
            tools=lambda: (Tool(guesser(secret, tries)),),
        )  # fmt: skip

    def demonstrate(self, problem: Problem, rng: random.Random) -> Demo:
        """The calls of one search. Where the guesses end without a hit the answer is the hidden number all the same:
        over many examples that is any number that is still possible, which is the best that can be said."""
        low, high = problem.meta["low"], problem.meta["high"]
        blind = rng.random() < self.config.blind
        ask = guesser(int(problem.answer), problem.level)
        turns: list[Message] = [Message("user", problem.prompt)]
        for i in range(problem.level):
            number = rng.randint(low, high) if blind else (low + high) // 2
            reply = ask(number)
            call = ToolCall(f"call-{i}", "guess", {"number": number})
            turns += [Message("assistant", reasoning="", tool_calls=(call,)), Message("tool", reply)]
            if reply == "=":
                break
            low, high = (low, number - 1) if reply == "<" else (number + 1, high)
        return Demo((*turns, Message("assistant", problem.answer, reasoning="")))

    def grade(self, problem: Problem, message: Message) -> Score:
        return Score(float(message.content.strip() == problem.answer))


def guesser(secret: int, tries: int) -> Callable[[int], str]:
    """The tool of one episode."""
    left = tries

    def guess(number: int) -> str:
        """Guess the number: < if it is smaller than your guess, > if it is larger, = if you have found it."""
        nonlocal left
        if left == 0:
            raise ToolFailure("no guesses left", "limit")
        left -= 1
        return "<" if secret < number else ">" if secret > number else "="

    return guess
