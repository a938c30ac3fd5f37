"""Reinforcement learning with verifiable rewards: sample groups, grade, take one step, repeat.

    step s:  P problems x G episodes -> rewards [P,G] -> advantages -> packed rows -> update

A step is a pure function of (weights, optimizer state, seed, s): problems, episode seeds and packing
are hashes and sorts, so a run that is killed and started again ends with the bits of one that was not.

The optimizer steps of a batch are in `epochs.py`, with what is measured and replayed there.

Rows are exactly what the model saw and wrote: token ids are never made from text. Not trained on:
prompts, tool results, forced tokens; answers whose score is not ok; groups whose rewards agree.
The routers' balancing biases stay as pretraining left them: RL sees few kinds of problems, and evening
out the load on these alone moves experts away from what they know (measured in docs/LOG.md).
Where episodes come from, and which are of older weights, is in `sampler.py`, `carry.py` and `ahead.py`; who
plays them elsewhere, in `workers.py` and `remote.py`.
Left out: critics, the routers' sequence-wise balance loss, several devices.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trivet.agent.loop import Row
from trivet.chat import Chat
from trivet.config import UserError
from trivet.disk import Journal
from trivet.model import Routing, Transformer
from trivet.model.lora import adapter_parameters, fingerprint
from trivet.rl.ahead import Ahead
from trivet.rl.climb import climb, set_standings, standings
from trivet.rl.config import RLConfig
from trivet.rl.epochs import Updates
from trivet.rl.loss import advantages
from trivet.rl.objectives import find_objective
from trivet.rl.page import LINES, describe_episode
from trivet.rl.rewards import Reward
from trivet.rl.rollout import Attempt
from trivet.rl.sampler import graded
from trivet.rl.source import make_sampler
from trivet.rl.summary import describe
from trivet.rl.update import pack
from trivet.tasks import Task
from trivet.train.checkpoint import load_latest, save_state
from trivet.train.optim import Optimizer
from trivet.train.trainer import Board, Deferred, Interrupted

TIMES = (  # metrics that differ from run to run
    "seconds", "seconds_generating", "seconds_training", "tokens_per_second", "training_tokens_per_second",
)  # fmt: skip


def learn(
    model: Transformer,
    chat: Chat,
    tasks: Sequence[tuple[Task, float]],
    config: RLConfig,
    out: Path,
    *,
    rewards: tuple[Reward, ...] = (),
    progress: Callable[[dict[str, Any]], None] | None = None,
    evaluate: Callable[[Transformer], dict[str, float]] | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Train `model` in place and return the last metrics. Resumes from `out`/resume if it is there.

    `model` holds the starting weights, also on resume: they are the reference of a KL term.
    `rewards` are added to what the tasks give. `evaluate` must not depend on anything but the model. Raises Interrupted on Ctrl-C or SIGTERM,
    UserError where too many answers can't be graded, or where engine and trainer disagree.
    """
    run = _Run(model.to(device), chat, tasks, config, Path(out), device, rewards)
    try:
        with Deferred() as asked:
            while run.step < config.steps:
                values = run.one_step()
                last = run.step == config.steps
                if evaluate and (last or (config.eval_every and run.step % config.eval_every == 0)):
                    values |= run.evaluate(evaluate)
                run.log(values, progress)
                if last or asked.stop or run.since_save() >= config.save_every_seconds:
                    run.save()
                if asked.stop and not last:
                    raise KeyboardInterrupt
    except KeyboardInterrupt:
        raise Interrupted(
            f"Stopped; step {run.saved} of {config.steps} is saved in {out}. The same command goes on from there."
        ) from None
    finally:
        run.close()
    return run.metrics


class _Run:
    """The state of a run between two steps."""

    def __init__(
        self, model: Transformer, chat: Chat, tasks: Sequence[tuple[Task, float]], config: RLConfig, out: Path,
        device: torch.device | str, rewards: tuple[Reward, ...] = (),
    ):  # fmt: skip
        self.model, self.chat, self.tasks, self.config, self.out, self.device = model, chat, tasks, config, out, device
        self.objective = find_objective(config.objective, config.overrides)
        if self.objective.normaliser == "constant" and self.objective.constant is None:
            self.objective = self.objective.model_copy(update={"constant": float(config.max_tokens)})
        if config.length > model.spec.context_length:
            raise UserError(
                f"rl.length ({config.length}) exceeds the model's context_length ({model.spec.context_length})."
            )
        self.optimizer = Optimizer(model.optimizer_groups(), config.muon_lr, config.adam_lr, config.weight_decay)
        self.updates = Updates(model, self.objective, self.optimizer, config, device)
        self.identity: dict[str, Any] = {
            "rl": config.model_dump(mode="json"),
            "spec": model.spec.model_dump(mode="json"),
            "tasks": [[task.name, weight] for task, weight in tasks],
        }
        for harmless in (
            "save_every_seconds",
            "page_every",
            "tensorboard",
            "recompute",
            "workers",
            "ray_address",
            "server",
        ):
            del self.identity["rl"][harmless]
        if rewards:
            self.identity["rewards"] = [[reward.label, reward.weight] for reward in rewards]
        if adapter_parameters(model):  # a state holds the adapters only
            self.identity["base"] = fingerprint(model)
        self.sampler = (
            Ahead(model, chat, tasks, config, device, out / "ahead", rewards)
            if config.lag
            else make_sampler(model, chat, tasks, config, device, rewards)
        )
        self.step, self.seconds, self.metrics = 0, 0.0, {}
        self.journal, self.rollouts = Journal(out / "metrics.jsonl"), Journal(out / LINES)
        state = load_latest(out / "resume", self.identity)
        if state is not None:
            state.apply(model, self.optimizer)
            self.step, self.seconds, self.metrics = state.step, state.extra["seconds"], state.extra["metrics"]
            set_standings(tasks, state.extra.get("standings", {}))
            self.sampler.load(state.step, state.extra["carried"])
        self.saved = self.step
        self.journal.truncate_after(self.step)
        self.rollouts.truncate_after(self.step)
        self.board = Board(out / "tensorboard", self.step) if config.tensorboard and self.step < config.steps else None
        self.began = self.saved_at = time.perf_counter()
        model.train()

    # --- one step -------------------------------------------------------------------------------
    def one_step(self) -> dict[str, Any]:
        began = time.perf_counter()
        batch = self.sampler.sample(self.step)
        generated, attempts = time.perf_counter(), batch.attempts
        values = describe(attempts) | batch.counts
        self.check_graded(attempts, values)
        values |= climb(self.tasks, attempts)
        sequences, advantage, values["no_spread"] = self.choose(attempts)
        if self.config.page_every and (self.step + 1) % self.config.page_every == 0:
            self.record(attempts)
        trained = sum(len(row.ids) for row in sequences)
        if sequences:
            values |= self.updates.learn_from(sequences, advantage, self.step)
        self.step += 1
        ended = time.perf_counter()
        return values | {
            "trained_share": len(sequences) / len(attempts),
            "seconds": self.seconds + ended - self.began,
            "seconds_generating": generated - began,
            "seconds_training": ended - generated,
            "tokens_per_second": batch.tokens / batch.seconds,
            "training_tokens_per_second": trained / (ended - generated),
        }

    def check_graded(self, attempts: Sequence[Attempt], values: dict[str, Any]) -> None:
        if values["not_ok"] > self.config.not_ok_limit * len(attempts):
            statuses = Counter(a.score.status for a in attempts if not a.score.ok)
            counts = ", ".join(f"{n} {status}" for status, n in sorted(statuses.items()))
            detail = next((a.score.detail for a in attempts if not a.score.ok and a.score.detail), "no detail")
            raise UserError(
                f"RL stopped at step {self.step}: {values['not_ok']} of {len(attempts)} answers could not be "
                f"graded ({counts}), more than not_ok_limit = {self.config.not_ok_limit:g}. The first: {detail}"
            )

    def judge(self, attempts: Sequence[Attempt]) -> tuple[Tensor, Tensor, Tensor]:
        """Advantages [P,G], which of them count [P,G], and which groups have spread [P]."""
        value, ok = graded(attempts, self.config.group)
        value, spread = advantages(value, ok, self.objective.advantage)
        return value, ok & spread[:, None], spread

    def choose(self, attempts: Sequence[Attempt]) -> tuple[list[Row], Tensor, float]:
        """Rows worth learning from, their advantages [S], and the share of groups that agree."""
        value, counts, spread = self.judge(attempts)
        kept = counts.flatten()
        rows = [a.row for a, keep in zip(attempts, kept.tolist(), strict=True) if keep]
        wrote = torch.tensor([any(row.trained) for row in rows], dtype=torch.bool)
        rows = [row for row in rows if any(row.trained)]
        return rows, value.flatten()[kept][wrote], 1 - spread.float().mean().item()

    @torch.no_grad()
    def record(self, attempts: Sequence[Attempt]) -> None:
        """Write down the episodes as they are before the update, with one forward pass of their own."""
        c = self.config
        value, counts, _ = self.judge(attempts)
        wrote = [i for i, attempt in enumerate(attempts) if any(attempt.row.trained)]
        seen: list[tuple[list[float], list[float]]] = [([], []) for _ in attempts]
        for part in pack([attempts[i].row for i in wrote], c.rows, c.length):
            part = part.to(self.device)
            numbers = self.updates.logprobs(self.model, part, Routing())
            for s, *both in zip(part.sequence.tolist(), *(n.tolist() for n in numbers), strict=True):
                for known, number in zip(seen[wrote[s]], both, strict=True):
                    known.append(number)
        for i, attempt in enumerate(attempts):
            advantage = value.flatten()[i].item() if counts.flatten()[i] else None
            self.rollouts.append(
                self.step + 1, **describe_episode(attempt, self.chat, i // c.group, advantage, *seen[i])
            )

    # --- bookkeeping ----------------------------------------------------------------------------
    def evaluate(self, evaluate: Callable[[Transformer], dict[str, float]]) -> dict[str, float]:
        self.model.eval()
        with torch.no_grad():
            scores = evaluate(self.model)
        self.model.train()
        return {f"eval/{name}": float(value) for name, value in scores.items()}

    def log(self, values: dict[str, Any], progress: Callable[[dict[str, Any]], None] | None) -> None:
        self.metrics = {"step": self.step, **values}
        self.journal.append(self.step, **values)
        if self.board is not None:
            self.board.write(self.step, values)
        if progress is not None:
            progress(self.metrics)

    def since_save(self) -> float:
        return time.perf_counter() - self.saved_at

    def save(self) -> None:
        if not all(bool(torch.isfinite(p).all()) for p in self.optimizer.parameters()):
            raise UserError(
                f"The weights are not finite after step {self.step}, so that state was not saved; the "
                f"last good one is step {self.saved}. Lower muon_lr or adam_lr."
            )
        self.journal.sync()
        self.rollouts.sync()
        extra = {
            "seconds": self.seconds + time.perf_counter() - self.began, "metrics": self.metrics,
            "carried": self.sampler.dump(self.step), "standings": standings(self.tasks),
        }  # fmt: skip
        save_state(self.out / "resume", self.step, self.model, self.optimizer, self.identity, extra)
        self.saved, self.saved_at = self.step, time.perf_counter()

    def close(self) -> None:
        self.sampler.close()
        if self.board is not None:
            self.board.close()
