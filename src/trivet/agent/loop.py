"""The agent loop: a ChatModel, tools and budgets become typed steps. Chat, evaluation and RL share it.

    while the model asks for tools: run them, hand the results back, let it go on
    in a world (`messages.World`): hand back what it says, until it says nothing

Token and thinking budgets are of the whole episode, not of a turn. Nothing that a model writes stops
the loop with an exception: a malformed call or an unknown tool is answered with text.

`row` is the exact training example of an episode: the ids that the model saw and wrote, with the
tokens that it sampled marked. It is read off the completions; nothing is tokenised.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from trivet.config import nearest
from trivet.messages import ChatModel, Message, Sampling, Score, StopReason, ToolCall, World
from trivet.tools import Tool, ToolResult


@dataclass(frozen=True)
class ModelStep:
    """One completion of the model."""

    message: Message


@dataclass(frozen=True)
class ToolStep:
    """One call and what came back."""

    call: ToolCall
    result: ToolResult


@dataclass(frozen=True)
class ReplyStep:
    """What a world said that is no result of a call."""

    message: Message


Step = ModelStep | ToolStep | ReplyStep


@dataclass(frozen=True)
class Episode:
    """What happened, in order. `stop` is why it ended; `failure` why its world could not go on."""

    prompt: tuple[Message, ...]
    steps: tuple[Step, ...]
    stop: StopReason | Literal["max_turns"]
    failure: Score | None = None

    @property
    def messages(self) -> tuple[Message, ...]:
        """The whole transcript, derived from the steps."""
        return (*self.prompt, *(_message(step) for step in self.steps))

    @property
    def final(self) -> Message:
        """The answer: text and thinking of all the model's turns, calls included, as one message."""
        turns = [step.message for step in self.steps if isinstance(step, ModelStep)]
        return replace(turns[-1], tool_calls=tuple(call for turn in turns for call in turn.tool_calls))

    @property
    def reasoning_tokens(self) -> int:
        return sum(c.reasoning_tokens for c in self.completions)

    @property
    def budget_hit(self) -> bool:
        return any(c.budget_hit for c in self.completions)

    @property
    def completions(self) -> list[Any]:
        return [step.message.completion for step in self.steps if isinstance(step, ModelStep)]


def _message(step: Step) -> Message:
    if isinstance(step, ToolStep):
        return Message("tool", step.result.text, tool_call_id=step.call.id)
    return step.message


async def run_episode(
    model: ChatModel, messages: Sequence[Message], tools: Sequence[Tool], sampling: Sampling, max_turns: int = 8,
    world: World | None = None,
) -> Episode:  # fmt: skip
    """Let the model answer, running the tools that it asks for, until it is done or out of budget.

    world: answers each turn in place of tools.
    """
    steps: list[Step] = []
    transcript = list(messages)
    specs = [tool.spec for tool in tools] if world is None else world.specs
    left = sampling.max_tokens
    for _ in range(max_turns):
        message = await model.complete(transcript, specs, replace(sampling, max_tokens=left))
        steps.append(ModelStep(message))
        transcript.append(message)
        completion = message.completion
        stop = completion.stop if completion is not None else StopReason.END
        left -= len(completion.tokens) if completion is not None else 0
        if stop not in (StopReason.TOOL_CALL, StopReason.END):
            return Episode(tuple(messages), tuple(steps), stop)
        said = _replies(world, transcript) if world is not None else _results(tools, message)
        if isinstance(said, Score):
            return Episode(tuple(messages), tuple(steps), StopReason.ERROR, said)
        if not said:
            return Episode(tuple(messages), tuple(steps), stop)
        steps += said
        transcript += map(_message, said)
        if left <= 0:
            return Episode(tuple(messages), tuple(steps), StopReason.LENGTH)
    return Episode(tuple(messages), tuple(steps), "max_turns")


def _results(tools: Sequence[Tool], message: Message) -> list[Step]:
    return [ToolStep(call, call_tool(tools, call)) for call in message.tool_calls if tools]


def _replies(world: World, transcript: Sequence[Message]) -> list[Step] | Score:
    """A world's reply as steps: what answers a call of the last turn is a ToolStep."""
    said = world.reply(transcript)
    if isinstance(said, Score):
        return said
    calls = {call.id: call for call in transcript[-1].tool_calls}
    return [
        ToolStep(calls[m.tool_call_id], ToolResult(m.content)) if m.role == "tool" and m.tool_call_id in calls
        else ReplyStep(m)
        for m in said
    ]  # fmt: skip


def call_tool(tools: Sequence[Tool], call: ToolCall) -> ToolResult:
    """Run one call. A call without a name goes to the first tool's first parameter (bare syntax)."""
    if call.error is not None:
        return ToolResult(f"error: {call.error}", "error")
    if call.name == "" and "" in call.arguments:
        return tools[0].run({tools[0].first: call.arguments[""]})
    known = {tool.name: tool for tool in tools}
    if call.name not in known:
        return ToolResult(f"error: no tool {call.name!r}.{nearest(call.name, known)}", "error")
    return known[call.name].run(call.arguments)


# ------------------------------------------------------------------------------------------ training
@dataclass(frozen=True)
class Row:
    """An episode as a training row. All lists have one entry a token of `ids`.

    trained: the model sampled this token (not the prompt, a tool result, or a forced token).
    logprobs: under the distribution sampled from; 0 where not trained.
    experts: Completion.experts of each completion that recorded them.
    sets: (start, Completion.sets) of each completion that recorded what its tokens were drawn from.
    stale: whether weights older than those that are to learn from it sampled this token; empty: none.
    """

    ids: tuple[int, ...]
    trained: tuple[bool, ...]
    logprobs: tuple[float, ...]
    experts: tuple[Any, ...] = ()
    sets: tuple[tuple[int, Any], ...] = ()
    stale: tuple[bool, ...] = ()


def row(episode: Episode) -> Row:
    """The exact row of an episode. Raises ValueError where a later turn did not see the ids of an
    earlier one unchanged, because then no single row is what happened."""
    last = episode.completions[-1]
    ids = (*last.prompt_tokens, *last.tokens)
    trained, logprobs = [False] * len(ids), [0.0] * len(ids)
    experts, sets = [], []
    for turn, completion in enumerate(episode.completions):
        start = len(completion.prompt_tokens)
        end = start + len(completion.tokens)
        if ids[:end] != (*completion.prompt_tokens, *completion.tokens):
            raise ValueError(f"turn {turn} of the episode is not a prefix of what later turns saw")
        trained[start:end] = completion.sampled
        logprobs[start:end] = completion.logprobs
        if completion.experts is not None:
            experts.append(completion.experts)
        if completion.sets is not None:
            sets.append((start, completion.sets))
    return Row(ids, tuple(trained), tuple(logprobs), tuple(experts), tuple(sets))
