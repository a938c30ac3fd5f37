"""Episodes that outlive the step that began them.

    step s       stops when `partial` of its episodes are done; the others are cut where they stand
    step s + 1   plays these again: whole turns are handed back as recorded, the last one goes on, by the new weights

A few long answers then no longer hold up the batch (Kimi k1.5, arXiv 2501.12599; APRIL, arXiv 2509.18521). A group
is learnt from when all its episodes are done. Its tokens come from several policies; of those that older weights
sampled the ratio's denominator is what the engine recorded (`Row.stale`), because the policy that sampled them is
gone.

What is carried is a record, in memory as on disk: JSON, in which numbers come back as they were. It is replayed
into the agent loop, so tools are called again and must answer as they did. Keys and values are computed anew.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from trivet.agent.loop import Episode, ModelStep
from trivet.engine import EngineModel
from trivet.messages import Completion, Message, Sampling, Score, StopReason, ToolSpec

Key = tuple[int, int, int]
DROPPED = ("prompt_tokens", "experts", "top_logprobs", "prompt_logprobs")  # known again, or not asked for


@dataclass(frozen=True)
class Started:
    """Episode `episode` of problem `problem` of a step. turns: its completions so far, without their prompts.

    versions: the step whose weights wrote each of their tokens. score: None while it is not done.
    """

    step: int
    problem: int
    episode: int
    turns: tuple[Completion, ...] = ()
    versions: tuple[int, ...] = ()
    score: Score | None = None

    @property
    def key(self) -> Key:
        return self.step, self.problem, self.episode

    @property
    def group(self) -> tuple[int, int]:
        return self.step, self.problem

    def after(self, episode: Episode, step: int, score: Score | None) -> Started:
        """As it stands after a step in which it was played."""
        turns = tuple(replace(c, prompt_tokens=(), experts=None) for c in episode.completions)
        new = sum(len(turn.tokens) for turn in turns) - len(self.versions)
        return replace(self, turns=turns, versions=(*self.versions, *[step] * new), score=score)

    def dump(self) -> str:
        turns = [{k: v for k, v in asdict(turn).items() if k not in DROPPED} for turn in self.turns]
        for turn in turns:
            turn["sets"] = turn["sets"] and [part.tolist() for part in turn["sets"]]
        return json.dumps(asdict(replace(self, turns=())) | {"turns": turns}, allow_nan=False)

    @classmethod
    def load(cls, text: str) -> Started:
        values: dict[str, Any] = json.loads(text)
        turns = tuple(_turn(turn) for turn in values.pop("turns"))
        score = values.pop("score")
        versions = tuple(values.pop("versions"))
        return cls(**values, turns=turns, versions=versions, score=Score(**score) if score is not None else None)


def _turn(values: dict[str, Any]) -> Completion:
    lists: dict[str, Any] = {
        name: tuple(values.pop(name)) for name in ("tokens", "sampled", "logprobs", "raw_logprobs")
    }
    sets, stop = values.pop("sets"), StopReason(values.pop("stop"))
    if sets is not None:
        ids, ends = sets
        sets = np.array(ids, np.int32), np.array(ends, np.int64)
    return Completion(**values, **lists, stop=stop, prompt_tokens=(), sets=sets)


def as_recorded(episode: Episode) -> Episode:
    """Without what a record leaves out, so that an episode is the same whether it was replayed or not."""
    steps = [
        replace(step, message=replace(step.message, completion=replace(step.message.completion, experts=None)))
        if isinstance(step, ModelStep) and step.message.completion is not None else step
        for step in episode.steps
    ]  # fmt: skip
    return replace(episode, steps=tuple(steps))


class Replay:
    """A ChatModel that first hands out the turns of an episode that it has; the engine goes on from there."""

    def __init__(self, model: EngineModel, turns: Sequence[Completion]) -> None:
        self.model, self.left = model, list(turns)

    async def complete(self, messages: Sequence[Message], tools: Sequence[ToolSpec], sampling: Sampling) -> Message:
        turn = self.left.pop(0) if self.left else None
        if turn is None or turn.stop is StopReason.CANCELLED:
            begun = turn if turn is not None and turn.tokens else None
            return await self.model.complete(messages, tools, sampling, begun)
        request = self.model.request(messages, tools, sampling)
        return self.model.message(request, replace(turn, prompt_tokens=request.prompt), tools)
