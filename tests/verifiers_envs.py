"""Environments as people write them for the `verifiers` package; test_tasks_verifiers.py plays them.

`load_environment(kind=...)` makes one. Nothing in here knows Trivet.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from typing import Any

import verifiers as vf
from datasets import Dataset

SHOT = [{"role": "user", "content": "1+1=?"}, {"role": "assistant", "content": "2"}]


def sums(first: int, count: int) -> Dataset:
    rows = [{"question": f"{i}+1=?", "answer": str(i + 1), "info": {"number": i}} for i in range(first, first + count)]
    return Dataset.from_list(rows)


def content(message: Any) -> str:
    return message["content"] or ""


def right(completion: Any, answer: str, parser: Any) -> float:
    return float(parser.parse_answer(completion) == answer)


async def near(completion: Any, info: dict[str, Any]) -> float:
    await asyncio.sleep(0)
    return 1 / (1 + abs(int(content(completion[-1]) or 0) - info["number"]))


def everything(prompt: Any, completion: Any, answer: str, state: Any, **kwargs: Any) -> float:
    assert content(prompt[0]) == "Answer with a number." and state["answer"] == answer and "info" in kwargs
    return 1.0


def broken(completion: Any, answer: str) -> float:
    raise KeyError(answer)


def no_number(completion: Any) -> float:
    return float("nan")


def sleeps(completion: Any) -> float:
    time.sleep(60 if content(completion[-1]) == "zzz" else 0)
    return 1.0


def dies(completion: Any) -> float:
    os._exit(3)


async def digits(completion: Any) -> float:
    text = content(completion[-1])
    return sum(c.isdigit() for c in text) / max(len(text), 6)


def compares(completions: Any) -> list[float]:
    return [0.0 for _ in completions]


RUBRICS: dict[str, list[tuple[Any, float]]] = {
    "single": [(right, 1.0), (near, 0.5), (everything, 0.0)],
    "digits": [(digits, 1.0)],
    "broken": [(right, 1.0), (broken, 0.1)],
    "broken_metric": [(right, 1.0), (broken, 0.0)],
    "no_number": [(no_number, 1.0)],
    "sleeps": [(sleeps, 1.0)],
    "dies": [(dies, 1.0)],
    "group": [(compares, 1.0)],
    "nothing": [],
}


PICTURE = {"type": "image_url", "image_url": {"url": "data:,"}}
ODD: dict[str, dict[str, Any]] = {  # rows that can't be played
    "picture": {"prompt": [{"role": "user", "content": [PICTURE]}], "answer": "1"},
    "no_question": {"prompt": [*SHOT], "answer": "1"},
    "own_tools": {"question": "?", "answer": "1", "info": {"tool_defs": [{"name": "f"}]}},
}


class Hidden(vf.MultiTurnEnv):
    """Guess the number; the environment says whether it is more or less."""

    moody = False

    async def setup_state(self, state: Any) -> Any:
        state["guesses"] = 0
        return state

    @vf.stop
    async def found(self, state: Any) -> bool:
        turns = state["trajectory"]
        return bool(turns) and content(turns[-1]["completion"][-1]) == state["answer"]

    async def env_response(self, messages: Any, state: Any, **kwargs: Any) -> Any:
        state["guesses"] += 1
        said = "more" if int(content(messages[-1])) < int(state["answer"]) else "less"
        return [{"role": "user", "content": said + (str(random.random()) if self.moody else "")}]


class Moody(Hidden):
    moody = True


class OwnRollout(Hidden):
    async def rollout(self, *args: Any, **kwargs: Any) -> Any:
        return {}


def found_it(completion: Any, answer: str) -> float:
    return float(content(completion[-1]) == answer)


def guesses(state: Any) -> float:
    return float(state["guesses"])


def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


def load_environment(kind: str = "single", rows: int = 40) -> vf.Environment:
    data, parser = {"dataset": sums(0, rows), "eval_dataset": sums(1000, 4)}, vf.Parser()
    if kind in ("hidden", "moody", "own_rollout"):
        rubric = vf.Rubric(funcs=[found_it, guesses], weights=[1.0, 0.0], parser=parser)
        classes = {"hidden": Hidden, "moody": Moody, "own_rollout": OwnRollout}
        return classes[kind](max_turns=4, rubric=rubric, parser=parser, **data)
    if kind == "tools":
        rubric = vf.Rubric(funcs=[right], parser=parser)
        return vf.ToolEnv(tools=[add], max_turns=3, rubric=rubric, parser=parser, **data)
    if kind == "mixture":
        return vf.EnvGroup([load_environment(), load_environment()])
    if kind in ODD:
        rubric = vf.Rubric(funcs=[right], parser=parser)
        return vf.SingleTurnEnv(dataset=Dataset.from_list([ODD[kind]] * 9), rubric=rubric, parser=parser)
    if kind == "one_set":
        rubric = vf.Rubric(funcs=[right], parser=parser)
        return vf.SingleTurnEnv(dataset=data["dataset"], rubric=rubric, parser=parser)
    if kind == "thinks":
        thinks = vf.ThinkParser()
        return vf.SingleTurnEnv(rubric=vf.Rubric(funcs=[right], parser=thinks), parser=thinks, **data)
    functions = RUBRICS[kind]
    rubric = vf.Rubric(funcs=[f for f, _ in functions], weights=[w for _, w in functions], parser=parser)
    return vf.SingleTurnEnv(
        system_prompt="Answer with a number.", few_shot=SHOT, rubric=rubric, parser=parser, **data
    )  # fmt: skip
