"""Rejection sampling: a model answers many times, and what is worth learning from is kept, filtered and counted.

    keep = "right"   up to `per_problem` right answers of each problem, as conversations (R1's third stage)
    keep = "pairs"   two answers of each problem and which of them was preferred, for a reward model

An answer is dropped, and counted under the first reason that applies: `not_ok` (could not be graded), `truncated`,
`wrong` (a score below `least`), `foreign` (a thought with characters outside of `alphabet`), `repeated` (the same text was kept
already). Of what is left of a problem the shortest are kept, or any, by hash.

Pairs come from people; here the task's grader plays them, as Bradley and Terry describe a rater: the better answer is preferred
with probability sigmoid(sharpness x difference of scores). Shown are the first two of a problem's answers whose scores
differ: raters who see no difference say nothing.

Written: data.jsonl, one line a conversation or pair, and done.json with all counts. Problems are worked through in
pieces, so a run that was stopped goes on where it was.
"""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import Any, Literal, Self

import torch
from pydantic import Field

from trivet.chat import Chat
from trivet.disk import Journal, write_atomic
from trivet.engine import PREFIX_BYTES, Engine
from trivet.hub.checkpoint import load_pair
from trivet.messages import Message, Sampling
from trivet.model import Transformer
from trivet.recipes.kinds.base import DATA, Context, StageBase, load_tasks
from trivet.rl.rollout import Attempt, Job, draw_problems, play
from trivet.spec import Frozen
from trivet.tasks import Task
from trivet.train.data import stable_hash

PIECE = 64  # problems that are answered together


class SampleConfig(Frozen):
    """What to ask for and what to keep."""

    problems: int = Field(gt=0, description="questions, drawn from the training split")
    n: int = Field(default=4, gt=0, description="answers of each")
    keep: Literal["right", "pairs"] = Field(default="right", description="conversations, or pairs for a reward model")
    temperature: float = Field(default=1.0, gt=0, description="of sampling")
    max_tokens: int = Field(default=256, gt=0, description="tokens of an answer, thinking included")
    thinking: int | Literal["off"] | None = Field(default=None, description="thinking budget; 'off': mode no_think")
    max_turns: int = Field(default=8, gt=0, description="completions of an answer, tool calls between them")
    least: float = Field(default=1.0, description="right: the score from which on an answer counts as right")
    per_problem: int = Field(default=1, gt=0, description="right: answers kept of each problem")
    choose: Literal["shortest", "any"] = Field(default="any", description="right: which of them")
    alphabet: str | None = Field(default=None, description="right: characters that a thought may have; unset: all")
    sharpness: float = Field(default=6.0, gt=0, description="pairs: how sure the raters are of a difference of 1")
    seed: int = Field(default=0, description="questions and answers are hashes of it")


class SampleStage(StageBase):
    """Data from a model's own answers."""

    kind: Literal["sample"] = "sample"
    start: str = Field(description="stage or model directory that answers")
    tasks: tuple[dict[str, Any], ...] = Field(min_length=1, description="tasks to draw from: name, weight, settings")
    sample: SampleConfig

    def inputs(self) -> set[str]:
        return {self.start}

    def reseeded(self, seed: int) -> Self:
        return self.model_copy(update={"sample": self.sample.model_copy(update={"seed": self.sample.seed + seed})})


def run(stage: SampleStage, context: Context) -> dict[str, Any]:
    model, chat = load_pair(context.find(stage.start), context.device)
    tasks = load_tasks(stage.tasks, context)
    config = stage.sample
    journal = Journal(context.out / "pieces.jsonl")
    done = {line["step"]: line for line in journal.read()}
    pieces = math.ceil(config.problems / PIECE)
    for piece in range(1, pieces + 1):
        if piece not in done:
            count = min(PIECE, config.problems - (piece - 1) * PIECE)
            groups = _answers(model.eval(), chat, tasks, config, piece, count)
            found: Counter[str] = Counter()
            lines = list(
                _kept(groups, config, found) if config.keep == "right" else _pairs(groups, config, piece, found)
            )
            done[piece] = {"step": piece, "lines": lines, "counts": dict(found)}
            journal.append(piece, lines=lines, counts=dict(found))
        if context.progress is not None:
            context.progress({"step": piece, "steps": pieces, "kept": sum(len(d["lines"]) for d in done.values())})
    counts: Counter[str] = sum((Counter(d["counts"]) for d in done.values()), Counter())
    texts = [json.dumps(line, ensure_ascii=False) for piece in sorted(done) for line in done[piece]["lines"]]
    kept = list(dict.fromkeys(texts))
    counts["repeated"] = len(texts) - len(kept)
    write_atomic(context.out / DATA, "".join(line + "\n" for line in kept))
    summary = {
        "problems": config.problems,
        "answers": config.problems * config.n,
        "kept": len(kept),
        **dict(counts.most_common()),
    }
    context.say(f"{context.out.name}: " + ", ".join(f"{n:,} {name}" for name, n in summary.items()))
    return summary


def _answers(
    model: Transformer, chat: Chat, tasks: Sequence[tuple[Task, float]], config: SampleConfig, piece: int, count: int
) -> list[list[Attempt]]:
    """`n` graded answers to each question of a piece: a pure function of (weights, seed, piece)."""
    drawn = draw_problems(tasks, config.seed, piece, count)
    jobs = [
        Job(task, problem, Sampling(temperature=config.temperature, max_tokens=config.max_tokens, thinking=config.thinking,
                                    seed=stable_hash(config.seed, piece, p, i)))
        for p, (task, problem) in enumerate(drawn) for i in range(config.n)
    ]  # fmt: skip
    tools = config.max_turns > 1 and any(task.tools for task, _ in drawn)
    engine = Engine(
        model, chat, min(512, len(jobs)), model.spec.context_length, prefix_bytes=PREFIX_BYTES if tools else 0
    )
    with torch.no_grad():
        attempts = play(engine, jobs, config.max_turns)
    return [attempts[i : i + config.n] for i in range(0, len(attempts), config.n)]


def _kept(groups: Sequence[Sequence[Attempt]], config: SampleConfig, counts: Counter[str]) -> Iterator[dict[str, Any]]:
    for group in groups:
        good: list[Attempt] = []
        for attempt in group:
            reason = _reason(attempt, config)
            if reason is None:
                good.append(attempt)
            else:
                counts[reason] += 1
        if not good:
            counts["problems without any"] += 1
        if config.choose == "shortest":
            good.sort(key=lambda a: a.tokens)
        counts["surplus"] += max(len(good) - config.per_problem, 0)
        for attempt in good[: config.per_problem]:
            yield {
                "messages": [_turn(m) for m in attempt.episode.messages],
                "mode": "no_think" if config.thinking == "off" else "think",
                "task": attempt.job.task.name,
                "score": attempt.score.value,
            }


def _reason(attempt: Attempt, config: SampleConfig) -> str | None:
    """Why an answer is not kept."""
    if not attempt.score.ok:
        return "not_ok"
    if attempt.truncated:
        return "truncated"
    if attempt.score.value < config.least:
        return "wrong"
    if config.alphabet is not None and set(attempt.episode.final.reasoning or "") - set(config.alphabet):
        return "foreign"
    if config.thinking != "off" and attempt.episode.final.reasoning is None:
        return "without a thought"
    return None


def _pairs(
    groups: Sequence[Sequence[Attempt]], config: SampleConfig, piece: int, counts: Counter[str]
) -> Iterator[dict[str, Any]]:
    for place, group in enumerate(groups):
        ok = [a for a in group if a.score.ok and not a.truncated]
        counts["not_ok or truncated"] += len(group) - len(ok)
        differ = ((a, b) for a, b in combinations(ok, 2) if a.score.value != b.score.value)
        a, b = next(differ, (None, None))
        if a is None or b is None:
            counts["problems without two that differ"] += 1
            continue
        one, two = a.episode.final.content.strip(), b.episode.final.content.strip()
        sure = 1 / (1 + math.exp(-config.sharpness * (a.score.value - b.score.value)))
        first = random.Random(stable_hash(config.seed, piece, place)).random() < sure
        yield {
            "question": [_turn(m) for m in a.job.problem.messages],
            "chosen": one if first else two,
            "rejected": two if first else one,
        }


def _turn(message: Message) -> dict[str, Any]:
    """A message as `tasks.conversations` reads it."""
    turn: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.reasoning is not None:
        turn["reasoning"] = message.reasoning
    if message.tool_calls:
        turn["tool_calls"] = [{"name": call.name, "arguments": dict(call.arguments)} for call in message.tool_calls]
    if message.tool_call_id is not None:
        turn["tool_call_id"] = message.tool_call_id
    return turn
