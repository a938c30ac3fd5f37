"""A task whose tools belong to one episode: state, and the same code in SFT, evaluation and RL."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace
from pathlib import Path

import pytest

from test_agent_loop import CHAT, Scripted
from test_rl_learner import config, make
from trivet.agent.loop import Episode, ToolStep, run_episode
from trivet.chat import bpe_chat
from trivet.config import UserError
from trivet.messages import Message, Sampling
from trivet.rl.learner import learn
from trivet.tasks import Problem, make_task, tools_for
from trivet.tools import Tool
from trivet.train.data import TaskDocuments

HUNT = make_task({"name": "hunt"})


def halving(problem: Problem, rng: random.Random) -> list[int]:
    """The twin's opposite: guesses by the rule that always succeeds."""
    (tool,) = tools_for(HUNT, problem)
    low, high, made = problem.meta["low"], problem.meta["high"], []
    for _ in range(problem.level):
        made.append((low + high) // 2)
        reply = tool.run({"number": made[-1]}).text
        if reply == "=":
            return made
        low, high = (low, made[-1] - 1) if reply == "<" else (made[-1] + 1, high)
    assert low == high
    return [*made, low]


def test_halving_always_finds_it_and_chance_does_not() -> None:
    problems = [HUNT.problem("test", i) for i in range(200)]
    assert all(halving(p, random.Random(0))[-1] == int(p.answer) for p in problems)
    rng = random.Random(1)
    lucky = sum(rng.randint(p.meta["low"], p.meta["high"]) == int(p.answer) for p in problems)
    assert lucky < 40


def test_a_tool_counts_its_own_episodes_calls() -> None:
    problem = HUNT.problem("test", 0, level=2)
    (one,), (other,) = tools_for(HUNT, problem), tools_for(HUNT, problem)
    assert [one.run({"number": -1}).text for _ in range(3)] == [">", ">", "no guesses left"]
    assert other.run({"number": 10**6}).text == "<" and other.run({"number": problem.answer}).text == "="


def test_an_episode_of_several_calls() -> None:
    problem = HUNT.problem("test", 1, level=4)
    guesses = halving(problem, random.Random(0))
    first, *calls = [f"<tool_call>{g}</tool_call>" for g in guesses]
    turns = ["<think>" + first, *calls, f"</think>{problem.answer}<end>"]
    if len(guesses) > 4:  # not hit: the last one is only the answer
        turns.pop(-2)
    episode: Episode = asyncio.run(
        run_episode(Scripted(*turns), problem.messages, tools_for(HUNT, problem), Sampling(max_tokens=200))
    )
    assert sum(isinstance(step, ToolStep) for step in episode.steps) >= 3
    assert HUNT.grade(problem, episode.final).value == 1.0


def test_examples_show_what_the_tool_would_have_said() -> None:
    for i in range(100):
        problem = HUNT.problem("train", i)
        messages = HUNT.demonstrate(problem, random.Random(i)).messages
        (tool,) = tools_for(HUNT, problem)
        calls = [m.tool_calls[0].arguments for m in messages if m.tool_calls]
        assert 1 <= len(calls) <= problem.level
        assert [tool.run(c).text for c in calls] == [m.content for m in messages if m.role == "tool"]


def test_prompts_of_examples_list_the_tasks_own_tools() -> None:
    chat = bpe_chat(["0..3?"] * 9, 300)
    specs = [tool.spec for tool in tools_for(HUNT, HUNT.problem("train", 0))]
    shown = chat.decode(TaskDocuments(HUNT, chat, 0, specs)[0].ids)
    assert '"guess"' in shown and '{"name": "guess", "arguments": {"number": ' in shown
    with pytest.raises(UserError, match="would list no tool"):
        TaskDocuments(HUNT, chat, 0)


def test_rl_plays_it_and_a_group_shares_nothing(tmp_path: Path) -> None:
    made: list[Tool] = []

    class Watched(type(HUNT)):  # type: ignore[misc]
        def problem(self, split: str, index: int, level: int | None = None) -> Problem:
            problem = super().problem(split, index, level)

            def tools() -> list[Tool]:
                made.extend(problem.tools())
                return made[-1:]

            return replace(problem, tools=tools)

    learn(make(noise=0.3), CHAT, [(Watched(HUNT.config), 1.0)], config(steps=1, max_tokens=24), tmp_path)
    assert len({id(tool) for tool in made}) == 4 * 4


def test_levels_that_do_not_fit() -> None:
    with pytest.raises(UserError, match="levels are from 1 to 6"):
        make_task({"name": "hunt", "levels": [7]})
    assert HUNT.grade(HUNT.problem("test", 0), Message("assistant", "no idea")).value == 0.0
