"""What a model is worth on a task: accuracy with its interval, what it spent, and what was cut short.

The same attempts and the same grader as in RL, on problems that RL never draws (split "test"). Scores
that are not ok are left out of the mean and counted by status; an answer that ran out of tokens is
wrong, and counted as `truncated`. One answer a question: Wilson's interval. n answers: questions are
resampled (bootstrap), and pass@k and maj@k are given too.

The same arguments give the same numbers: problem i is problem i, and its seeds are hashes.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from trivet.agent.loop import Episode, ModelStep, ToolStep
from trivet.chat import Chat
from trivet.config import UserError
from trivet.engine import PREFIX_BYTES, Engine
from trivet.engine.policy import Full, Policy
from trivet.measure.results import Budget, Piece, Result, Share, Transcript
from trivet.measure.stats import bootstrap, maj_at, pass_at, wilson
from trivet.messages import Sampling
from trivet.model import Transformer
from trivet.rl.rewards import Reward
from trivet.rl.rollout import Attempt, Job, play
from trivet.tasks import Split, Task
from trivet.train.data import stable_hash

SAMPLES = 6  # transcripts kept, spread over the problems


def evaluate(
    model: Transformer,
    chat: Chat,
    task: Task,
    *,
    split: Split = "test",
    count: int = 512,
    level: int | None = None,
    sampling: Sampling | None = None,
    tools: bool = True,
    n: int = 1,
    seed: int = 0,
    max_turns: int = 8,
    max_rows: int = 512,
    slots: int | None = None,
    policy: Policy | None = None,
    rewards: tuple[Reward, ...] = (),
) -> Result:
    """Accuracy of `model` on problems 0..count-1 of a split, each answered n times.

    sampling: greedy by default; its own seed is replaced by hashes of `seed`. level: only problems of
    that level. the cache is at most max_rows x slots: at once, and tokens each (default: the model's context
    length; a long one is worth lowering). policy: what it keeps of a token. rewards: terms beside the task's grade,
    to be watched: their means are the result's `parts`; with a weight of 0 the accuracy stays the task's. Raises UserError where nothing could be graded.
    """
    sampling = sampling or Sampling(temperature=0.0)
    if count < 1 or n < 1:
        raise UserError(f"An evaluation needs count >= 1 and n >= 1, got {count} and {n}.")
    problems = [task.problem(split, i, level) for i in range(count)]
    jobs = [
        Job(task, problem, replace(sampling, seed=stable_hash(seed, i, j)), tools, rewards)
        for i, problem in enumerate(problems)
        for j in range(n)
    ]
    training = model.training
    policy = policy or Full()
    prefix = PREFIX_BYTES if tools and task.tools and policy.resumes else 0  # only turns with tools come back
    rows, slots = min(max_rows, len(jobs)), slots or model.spec.context_length
    engine = Engine(model.eval(), chat, rows, slots, prefix_bytes=prefix, policy=policy)
    began = time.perf_counter()
    try:
        attempts = play(engine, jobs, max_turns)
    finally:
        model.train(training)
    seconds = time.perf_counter() - began
    groups = [attempts[i : i + n] for i in range(0, len(attempts), n)]
    if not any(a.score.ok for a in attempts):
        first = attempts[0].score
        raise UserError(f"Not one answer to {task.name!r} could be graded; the first: {first.status}: {first.detail}")
    size = len(attempts)
    return Result(
        task=task.name, split=split, level=level, thinking=sampling.thinking, temperature=sampling.temperature,
        tools=tools and bool(task.tools), seed=seed, questions=count, n=n,
        accuracy=share(groups, seed),
        statuses=dict(sorted(Counter(a.score.status for a in attempts).items())),
        parts=_parts([a for a in attempts if a.score.ok]),
        thinks=sum(a.thinks for a in attempts) / size,
        calls_tool=sum(a.calls_tool for a in attempts) / size,
        budget_hit=sum(a.episode.budget_hit for a in attempts) / size,
        truncated=sum(a.truncated for a in attempts) / size,
        mean_tokens=sum(a.tokens for a in attempts) / size,
        mean_reasoning_tokens=sum(a.episode.reasoning_tokens for a in attempts) / size,
        tokens_per_second=sum(a.tokens for a in attempts) / seconds,
        **_at_k(groups, n, seed),
        by_level=_by_level(groups, seed),
        samples=tuple(transcript(groups[i][0]) for i in range(0, count, -(-count // SAMPLES))),
    )  # fmt: skip


def budget_sweep(
    model: Transformer, chat: Chat, task: Task, budgets: Sequence[Budget], *, sampling: Sampling | None = None, seed: int = 0,
    count: int = 512, level: int | None = None, tools: bool = True, n: int = 1, split: Split = "test",
) -> tuple[Result, ...]:  # fmt: skip
    """`evaluate` at several thinking budgets, on the same problems."""
    sampling = sampling or Sampling(temperature=0.0)
    return tuple(
        evaluate(model, chat, task, split=split, count=count, level=level, sampling=replace(sampling, thinking=budget),
                 tools=tools, n=n, seed=seed)
        for budget in budgets
    )  # fmt: skip


def _parts(attempts: Sequence[Attempt]) -> dict[str, float]:
    """Means of what scores are made of."""
    names = sorted({name for a in attempts for name in a.score.parts})
    found = {name: [a.score.parts[name] for a in attempts if name in a.score.parts] for name in names}
    return {name: sum(values) / len(values) for name, values in found.items()}


def share(groups: Sequence[Sequence[Attempt]], seed: int = 0) -> Share:
    """Mean score over questions and its interval. Scores that are not ok are left out."""
    graded = [[a.score.value for a in group if a.score.ok] for group in groups]
    means = [sum(values) / len(values) for values in graded if values]
    count = sum(len(values) for values in graded)
    if not means:
        return Share(mean=0.0, low=0.0, high=1.0, count=0)
    mean = sum(means) / len(means)
    single = all(len(values) <= 1 for values in graded) and all(m in (0.0, 1.0) for m in means)
    low, high = wilson(sum(means), len(means)) if single else bootstrap(means, seed)
    return Share(mean=mean, low=low, high=high, count=count)


def transcript(attempt: Attempt) -> Transcript:
    """An attempt for people to read."""
    return Transcript(
        prompt=attempt.job.problem.prompt,
        pieces=tuple(_pieces(attempt.episode)),
        expected=attempt.job.problem.answer,
        score=attempt.score.value if attempt.score.ok else None,
        status=attempt.score.status,
        tokens=attempt.tokens,
        budget_hit=attempt.episode.budget_hit,
    )


def _pieces(episode: Episode) -> list[Piece]:
    pieces: list[Piece] = []
    for step in episode.steps:
        if isinstance(step, ModelStep):
            if step.message.reasoning:
                pieces.append(Piece(kind="thinking", text=step.message.reasoning))
            if step.message.content:
                pieces.append(Piece(kind="answer", text=step.message.content))
        elif isinstance(step, ToolStep):
            text = " ".join([step.call.name, *(str(v) for v in step.call.arguments.values())]).strip()
            pieces += [Piece(kind="call", text=text), Piece(kind="result", text=step.result.text)]
        else:
            pieces.append(Piece(kind="result", text=step.message.content))
    return pieces


def _by_level(groups: Sequence[Sequence[Attempt]], seed: int) -> dict[int, Share]:
    levels = sorted({group[0].job.problem.level for group in groups})
    return {k: share([g for g in groups if g[0].job.problem.level == k], seed) for k in levels}


def _at_k(groups: Sequence[Sequence[Attempt]], n: int, seed: int) -> dict[str, dict[int, float]]:
    """pass@k and maj@k for k = 1, 2, 4 .. n over the questions whose n answers were all graded."""
    whole = [group for group in groups if all(a.score.ok for a in group)]
    if n == 1 or not whole:
        return {}
    ks = sorted({n, *(2**i for i in range(n.bit_length()) if 2**i <= n)})
    passed, agreed = {}, {}
    for k in ks:
        right = [[a.score.value >= 1 for a in group] for group in whole]
        answers = [[a.episode.final.content.strip() for a in group] for group in whole]
        passed[k] = sum(pass_at(k, n, sum(r)) for r in right) / len(whole)
        agreed[k] = sum(maj_at(k, a, r, seed) for a, r in zip(answers, right, strict=True)) / len(whole)
    return {"pass_at": passed, "maj_at": agreed}
