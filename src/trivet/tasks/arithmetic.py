"""Two-digit arithmetic left to right, `74+20*3=` is 282: beyond a tiny model, trivial with a calculator.

Worked examples call the calculator once a step inside the thought; a share of them answers without
it, so the cold start knows both ways and RL has to find out which one pays.
"""

from __future__ import annotations

import random
from typing import Literal

from pydantic import Field

from trivet.messages import Message, Score, ToolCall
from trivet.spec import Frozen
from trivet.tasks.base import Demo, Problem, Split, draw
from trivet.tasks.chain import OPERATORS


class ArithmeticConfig(Frozen):
    name: Literal["arithmetic"] = "arithmetic"
    levels: tuple[int, ...] = Field(default=(1, 2, 3), description="numbers of operations; repeat one to weigh it")
    tool: float = Field(default=0.5, ge=0, le=1, description="share of examples that use the calculator")
    no_think: float = Field(default=0.1, ge=0, le=1, description="share that answers with the thinking block shut")
    seed: int = 0


class Arithmetic:
    tools: tuple[str, ...] = ("calculator",)

    def __init__(self, config: ArithmeticConfig) -> None:
        self.config = config
        self.name: str = config.name
        self.levels = tuple(sorted(set(config.levels)))

    def problem(self, split: Split, index: int, level: int | None = None) -> Problem:
        drawn = self.config.levels
        steps = drawn[index % len(drawn)] if level is None else level

        def make(rng: random.Random) -> tuple[str, tuple[list[tuple[str, int]], int]]:
            value = rng.randrange(10, 100)
            text, calls = str(value), []
            for _ in range(steps):
                operator, number = rng.choice(OPERATORS), rng.randrange(10, 100)
                text += f"{operator}{number}"
                call = f"{value}{operator}{number}"
                value = {"+": value + number, "-": value - number, "*": value * number}[operator]
                calls.append((call, value))
            return text + "=", (calls, value)

        text, (calls, value) = draw(make, split, "arithmetic", self.config.seed, index, steps)
        return Problem(f"arithmetic-{split}-{index}", text, str(value), steps, {"calls": calls})

    def demonstrate(self, problem: Problem, rng: random.Random) -> Demo:
        user = Message("user", problem.prompt)
        kind = rng.random()
        if kind < self.config.tool:
            turns: list[Message] = [user]
            for i, (call, value) in enumerate(problem.meta["calls"]):
                made = ToolCall(f"call-{i}", "calculator", {"expression": call})
                turns += [Message("assistant", reasoning="", tool_calls=(made,)), Message("tool", str(value))]
            return Demo((*turns, Message("assistant", problem.answer, reasoning="")))
        if kind < self.config.tool + self.config.no_think:
            return Demo((user, Message("assistant", problem.answer)), thinking=False)
        return Demo((user, Message("assistant", problem.answer, reasoning="")))

    def grade(self, problem: Problem, message: Message) -> Score:
        return Score(float(message.content.strip() == problem.answer))
