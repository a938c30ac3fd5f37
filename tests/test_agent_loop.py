"""The agent loop with scripted models: budgets, tools, and the exact training row."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

import pytest

from trivet.agent.loop import Episode, ModelStep, ToolStep, row, run_episode
from trivet.chat import tiny_chat
from trivet.messages import Completion, Message, Sampling, StopReason, ToolSpec
from trivet.tools import get_tool

CHAT = tiny_chat()
CALCULATOR = get_tool("calculator")


class Scripted:
    """A ChatModel that writes given texts, turn by turn."""

    def __init__(self, *turns: str) -> None:
        self.turns, self.asked = list(turns), []  # type: ignore[var-annotated]

    async def complete(self, messages: Sequence[Message], tools: Sequence[ToolSpec], sampling: Sampling) -> Message:
        self.asked.append(sampling)
        prompt = CHAT.render(messages, tools, generate=True).ids
        ids = tuple(CHAT.tokenizer.encode(self.turns.pop(0), add_special_tokens=False).ids)[: sampling.max_tokens]
        stop = (
            StopReason.TOOL_CALL
            if ids[-1] == CHAT.tool_close_id
            else StopReason.END
            if ids[-1] == CHAT.end_id
            else StopReason.LENGTH
        )
        done = Completion(
            CHAT.decode(ids), ids, (True,) * len(ids), (-0.5,) * len(ids), (-0.5,) * len(ids), stop, tuple(prompt)
        )
        return replace(CHAT.parse(ids, CHAT.thinking_open(prompt)), completion=done)


def play(*turns: str, max_tokens: int = 100, max_turns: int = 8) -> tuple[Episode, Scripted]:
    model = Scripted(*turns)
    sampling = Sampling(max_tokens=max_tokens)
    return asyncio.run(run_episode(model, [Message("user", "74+20*3=")], [CALCULATOR], sampling, max_turns)), model


def test_thinking_goes_on_after_a_tool_result() -> None:
    episode, model = play("<think><tool_call>74+20</tool_call>", "<tool_call>94*3</tool_call>", "</think>282<end>")
    assert [type(step) for step in episode.steps] == [ModelStep, ToolStep, ModelStep, ToolStep, ModelStep]
    assert [s.result.text for s in episode.steps if isinstance(s, ToolStep)] == ["94", "282"]
    assert episode.final.content == "282" and len(episode.final.tool_calls) == 2 and episode.stop == StopReason.END
    assert [s.max_tokens for s in model.asked] == [100, 92, 86]  # one budget for the episode


def test_the_row_is_what_was_seen_and_written() -> None:
    episode, _ = play("<think><tool_call>74+20</tool_call>", "</think>94<end>")
    example = row(episode)
    assert CHAT.decode(example.ids) == (
        "<user>74+20*3=<assistant><think><tool_call>74+20</tool_call><tool_response>94</tool_response></think>94<end>"
    )
    marked = CHAT.decode([i for i, t in zip(example.ids, example.trained, strict=True) if t])
    assert marked == "<think><tool_call>74+20</tool_call></think>94<end>"
    assert {p for p, t in zip(example.logprobs, example.trained, strict=True) if t} == {-0.5}


def test_a_row_that_never_happened_is_refused() -> None:
    """The twin: a template that changed an earlier turn must not pass."""
    episode, _ = play("<think><tool_call>74+20</tool_call>", "</think>94<end>")
    last = episode.steps[-1]
    assert isinstance(last, ModelStep) and last.message.completion is not None
    prompt = list(last.message.completion.prompt_tokens)
    prompt[8] += 1
    changed = replace(last.message, completion=replace(last.message.completion, prompt_tokens=tuple(prompt)))
    with pytest.raises(ValueError, match="not a prefix"):
        row(replace(episode, steps=(*episode.steps[:-1], ModelStep(changed))))


def test_bad_calls_are_answered_not_raised() -> None:
    episode, _ = play("<think><tool_call>74+</tool_call>", "<tool_call></tool_call>", "</think>1<end>")
    results = [s.result for s in episode.steps if isinstance(s, ToolStep)]
    assert all(r.status == "error" and r.text.startswith("error") for r in results) and len(results) == 2
    assert episode.stop == StopReason.END


def test_the_loop_ends_at_its_limits() -> None:
    call = "<tool_call>1+1</tool_call>"
    assert play("<think>" + call, *[call] * 9, max_turns=3)[0].stop == "max_turns"
    assert play("<think>" + call, *[call] * 9, max_tokens=12)[0].stop == StopReason.LENGTH
    assert play("<think>9", max_tokens=50)[0].stop == StopReason.LENGTH


def test_without_tools_a_call_ends_the_episode() -> None:
    model = Scripted("<think><tool_call>1+1</tool_call>")
    episode = asyncio.run(run_episode(model, [Message("user", "1=")], [], Sampling()))
    assert len(episode.steps) == 1
