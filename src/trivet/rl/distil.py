"""A student learns a teacher's distribution, token by token, on text that one of them writes.

    reverse   KL(student || teacher) = sum over v of  p (log p - log q)      gradient  p (log p - log q - KL)
    forward   KL(teacher || student) = sum over v of  q (log q - log p)      gradient  p - q       (in the student's logits)

writer = "student": on-policy (GKD, 2306.13649; Qwen3's second phase, 2505.09388): the student is corrected where it goes
itself, which no text of a teacher shows. writer = "teacher": the teacher's own samples, its distribution instead of the
token that it happened to draw. Both whole distributions at temperature 1 (q is not sampled), so there are no rewards, no
groups and no graders: a task gives the questions, and its score is only watched.

Teacher and student share a vocabulary. Only tokens that the writer sampled count: no prompts, tool results or forced ones.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.autograd.function import once_differentiable

from trivet.chat import Chat
from trivet.config import UserError
from trivet.engine import Engine
from trivet.messages import Sampling
from trivet.model import Transformer
from trivet.model.lora import fingerprint
from trivet.rl.rollout import Attempt, Job, draw_problems, play
from trivet.rl.update import Packed, pack
from trivet.tasks import Task
from trivet.train.data import stable_hash
from trivet.train.loop import Loop, Progress, RunConfig, identity_of
from trivet.train.losses import CHUNK
from trivet.train.optim import Optimizer, clip, schedule

Kind = Literal["reverse", "forward"]


class DistilConfig(RunConfig):
    """How a student learns from a teacher."""

    steps: int = Field(gt=0, description="batches of answers, each written with fresh weights")
    writer: Literal["student", "teacher"] = Field(default="student", description="whose answers are learnt from")
    kl: Kind = Field(default="reverse", description="reverse: KL(student || teacher); forward: KL(teacher || student)")
    answers: int = Field(default=64, gt=0, description="answers of a batch, each to a question of its own")
    temperature: float = Field(default=1.0, gt=0, description="of sampling")
    max_tokens: int = Field(default=256, gt=0, description="tokens of an answer, thinking included")
    thinking: int | Literal["off"] | None = Field(default=None, description="thinking budget; unset: unlimited")
    max_turns: int = Field(default=8, gt=0, description="completions of an answer, tool calls between them")
    max_rows: int = Field(default=512, gt=0, description="answers that are written at the same time")
    muon_lr: float = Field(default=0.003, ge=0, description="learning rate of the matrices")
    adam_lr: float = Field(default=3e-4, ge=0, description="learning rate of everything else")
    decay_share: float = Field(default=1.0, ge=0, le=1, description="last share of the run, in which the rate falls")
    clip: float = Field(default=1.0, gt=0, description="largest norm of the gradient; inf: never clip")
    rows: int = Field(default=16, gt=0, description="rows of a microbatch")
    length: int = Field(default=256, gt=0, description="token slots of a row; the longest answer that fits")
    not_ok_limit: float = Field(default=0.02, ge=0, le=1, description="stop when more could not be generated")
    seed: int = Field(default=0, description="questions and answers are hashes of it")


def distil(
    student: Transformer,
    teacher: Transformer,
    chat: Chat,
    tasks: Sequence[tuple[Task, float]],
    config: DistilConfig,
    out: Path,
    *,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train `student` in place -> the last metrics. Resumes from `out`/resume, to the same bits."""
    if student.spec.vocab_size != teacher.spec.vocab_size:
        raise UserError(
            f"Student and teacher need one vocabulary, they have {student.spec.vocab_size} and {teacher.spec.vocab_size} tokens."
        )
    teacher.eval().requires_grad_(False)
    optimizer = Optimizer(student.optimizer_groups(), config.muon_lr, config.adam_lr)
    identity: dict[str, Any] = {
        **config.identity(),
        **identity_of(student),
        "tasks": [[task.name, weight] for task, weight in tasks],
        "teacher": fingerprint(teacher),
    }
    loop = Loop(student, optimizer, config, out, identity)

    def one_step(step: int) -> dict[str, Any]:
        began = time.perf_counter()
        attempts = write(student if config.writer == "student" else teacher, chat, tasks, config, step)
        generated = time.perf_counter()
        values = _watched(attempts, config)
        parts = [part.to(student.embed.device) for part in pack([a.row for a in attempts], config.rows, config.length)]
        tokens = sum(len(part.targets) for part in parts)
        student.train()
        total = sum(_backward(student, teacher, part, config.kl, tokens) for part in parts)
        norm = clip(optimizer.parameters(), config.clip)
        optimizer.step(schedule(step, config.steps, decay_share=config.decay_share))
        optimizer.zero_grad()
        spent = {"seconds_generating": generated - began, "seconds_training": time.perf_counter() - generated}
        return {"kl": total, "grad_norm": norm.item(), **values, **spent}

    return loop.run(one_step, progress)


def write(
    writer: Transformer, chat: Chat, tasks: Sequence[tuple[Task, float]], config: DistilConfig, step: int
) -> list[Attempt]:
    """A batch of answers: a pure function of the writer's weights and the step."""
    jobs = [
        Job(task, problem, Sampling(temperature=config.temperature, max_tokens=config.max_tokens, thinking=config.thinking,
                                    seed=stable_hash(config.seed, step, i)))
        for i, (task, problem) in enumerate(draw_problems(tasks, config.seed, step, config.answers))
    ]  # fmt: skip
    training = writer.training
    engine = Engine(writer.eval(), chat, min(config.max_rows, len(jobs)), config.length + 1)
    attempts = play(engine, jobs, config.max_turns)
    writer.train(training)
    return attempts


def _watched(attempts: list[Attempt], config: DistilConfig) -> dict[str, float]:
    """Scores and lengths, which nothing is learnt from; answers without a token of their own are left out."""
    failed = [a for a in attempts if a.score.status == "error"]
    if len(failed) > config.not_ok_limit * len(attempts):
        raise UserError(
            f"{len(failed)} of {len(attempts)} answers failed, more than not_ok_limit = {config.not_ok_limit:g}. "
            f"The first: {failed[0].score.detail}"
        )
    ok = [a.score.value for a in attempts if a.score.ok]
    found = {
        "reward": sum(ok) / max(len(ok), 1),
        "answer_tokens": sum(a.tokens for a in attempts) / len(attempts),
        "not_ok": float(len(attempts) - len(ok)),
    }
    attempts[:] = [a for a in attempts if any(a.row.trained)]
    return found


def _backward(student: Transformer, teacher: Transformer, part: Packed, kind: Kind, tokens: int) -> float:
    """Add the gradient of a microbatch's share of the mean KL a token; that share."""
    with torch.no_grad():
        goal = teacher(part.tokens, part.positions, apart=part.apart)[part.wanted]  # [N,D of the teacher]
    hidden = student(part.tokens, part.positions, apart=part.apart)[part.wanted]
    loss = token_kl(hidden, student.head_weight, goal, teacher.head_weight, kind).sum() / tokens
    loss.backward()
    return float(loss.detach())


def token_kl(
    hidden: Tensor, weight: Tensor, goal: Tensor, goal_weight: Tensor, kind: Kind = "reverse", chunk: int | None = None
) -> Tensor:
    """KL of each token's distribution [N] in fp32; hidden [N,D], weight [V,D] are the student's, goal [N,D'], goal_weight [V,D'] the teacher's.

    Logits exist for a chunk of tokens at a time, in forward and backward. The teacher gets no gradient.
    """
    values: Tensor = _TokenKL.apply(hidden, weight, goal, goal_weight, kind == "reverse", chunk)
    return values


class _TokenKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, goal: Tensor, goal_weight: Tensor, reverse: bool, chunk: int | None
    ) -> Tensor:
        values = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        ctx.size = chunk or max(1, CHUNK // len(weight))
        for start in range(0, len(hidden), ctx.size):
            part = slice(start, start + ctx.size)
            p, q = _logs(hidden[part], weight), _logs(goal[part], goal_weight)  # [n,V]
            values[part] = (p.exp() * (p - q)).sum(-1) if reverse else (q.exp() * (q - p)).sum(-1)
        ctx.save_for_backward(hidden, weight, goal, goal_weight, values)
        ctx.reverse = reverse
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        hidden, weight, goal, goal_weight, values = ctx.saved_tensors
        d_hidden = torch.empty_like(hidden)
        d_weight = torch.zeros_like(weight, dtype=torch.float32)
        for start in range(0, len(hidden), ctx.size):
            part = slice(start, start + ctx.size)
            h = hidden[part]
            p, q = _logs(h, weight), _logs(goal[part], goal_weight)
            dz = p.exp() * (p - q - values[part, None]) if ctx.reverse else p.exp() - q.exp()
            dz = (dz * grad[part, None]).to(h.dtype)
            d_hidden[part] = dz @ weight
            d_weight += dz.T @ h
        return d_hidden, d_weight.to(weight.dtype), None, None, None, None


def _logs(hidden: Tensor, weight: Tensor) -> Tensor:
    return (hidden @ weight.T).float().log_softmax(-1)
