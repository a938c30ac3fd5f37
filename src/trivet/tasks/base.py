"""What a task is: problems without end, worked examples, and one grader for RL and evaluation.

A problem is a pure function of (task seed, split, index). Train and test are told apart by a hash of
the problem's own text, so that no test problem can ever be drawn for training, whatever the seeds.
An index also fixes the level (index mod number of levels), so every stretch of indices is balanced.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal, Protocol

from trivet.messages import Message, Score, World
from trivet.tools import Tool, get_tool

Split = Literal["train", "test"]
TEST_SHARE = 8  # one text in eight is a test problem


@dataclass(frozen=True)
class Problem:
    """One question. `answer` is the reference, `meta` what the grader needs besides.

    `tools` makes the tools of one episode, where they belong to this problem and remember what happened; without it
    the task's tools are the built-in ones of these names. They must say the same after the same calls.
    `opening` are the turns before the question: a system prompt, examples. `world` answers the model in place of
    tools, and grades the episode.
    """

    id: str
    prompt: str
    answer: str
    level: int = 0
    meta: Mapping[str, Any] = field(default_factory=dict)
    tools: Callable[[], Sequence[Tool]] | None = field(default=None, compare=False)
    opening: tuple[Message, ...] = ()
    world: World | None = field(default=None, compare=False)

    @property
    def messages(self) -> list[Message]:
        return [*self.opening, Message("user", self.prompt)]


@dataclass(frozen=True)
class Demo:
    """A worked example. thinking=False: it shows how to answer with the thinking block shut.

    learn_thoughts=False: thoughts stand in it without loss, so that only the answers are learnt.
    """

    messages: tuple[Message, ...]
    thinking: bool = True
    learn_thoughts: bool = True


class Task(Protocol):
    """A name, the tools its problems may use, problems, worked examples, a grader."""

    name: str
    tools: tuple[str, ...]
    levels: tuple[int, ...]

    def problem(self, split: Split, index: int, level: int | None = None) -> Problem: ...

    def demonstrate(self, problem: Problem, rng: random.Random) -> Demo: ...

    def grade(self, problem: Problem, message: Message) -> Score:
        """The reward and the eval score. A wrong or missing answer is a 0 that is ok; a status other
        than ok means that the grader itself failed, and the score does not count."""
        ...


def tools_for(task: Task, problem: Problem, built_in: Callable[[str], Tool] = get_tool) -> Sequence[Tool]:
    """The tools of one episode on a problem."""
    return [built_in(name) for name in task.tools] if problem.tools is None else problem.tools()


@lru_cache(maxsize=4)
def shuffled(count: int, key: int | str) -> list[int]:
    """The numbers 0 to count - 1 in an order of their own: that of one of endless laps over a finite set."""
    order = list(range(count))
    random.Random(key).shuffle(order)
    return order


def draw(make: Callable[[random.Random], tuple[str, Any]], split: Split, *key: object) -> tuple[str, Any]:
    """Draw (text, rest) until the text falls into the split. Raises ValueError if it never does."""
    for attempt in range(10_000):
        text, rest = make(random.Random(f"{key} {attempt}"))
        if is_test(text) == (split == "test"):
            return text, rest
    raise ValueError(f"no {split} problem in 10,000 draws for {key}: there are too few different problems")


def is_test(text: str) -> bool:
    return hashlib.blake2s(text.encode()).digest()[0] % TEST_SHARE == 0
