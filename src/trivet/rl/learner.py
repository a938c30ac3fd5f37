"""Reinforcement learning with verifiable rewards: sample groups, grade, take one step, repeat.

    step s:  P problems x G episodes -> rewards [P,G] -> advantages -> packed rows -> update

A step is a pure function of (weights, optimizer state, seed, s): problems, episode seeds and packing
are hashes and sorts, so a run that is killed and started again ends with the bits of one that was not.

Which ratio is which. Two forward passes give log-probabilities of a sampled token: the engine's, token
by token with a cache, and the trainer's, over packed rows. They are the same module and the same
weights, but sum in another order, so they differ by rounding. The objective's importance ratio is
about *weights*: its denominator is the trainer's own forward at the weights that sampled, taken in
the first update (where the ratio is then exactly 1; anything else is a bug and stops the run) and kept
for later updates of the same batch. The difference between engine and trainer is *not* a ratio to be
corrected away: it is measured apart (`mismatch/*`, k3 estimate of KL(engine || trainer)), and a run
stops when it exceeds what rounding explains, because then one of the two is wrong.

With experts, later updates of a batch replay the experts that its first forward chose, so that the
ratio measures the change of the weights and not a flipped choice ("routing replay", GSPO, 2507.18071).

Rows are exactly what the model saw and wrote: token ids are never made from text. Not trained on:
prompts, tool results, forced tokens; answers whose score is not ok; groups whose rewards agree.
The routers' balancing biases stay as pretraining left them: RL sees few kinds of problems, and evening
out the load on these alone moves experts away from what they know (measured in docs/LOG.md).
Left out: critics, asynchronous sampling, the routers' sequence-wise balance
loss, several devices.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trivet.agent.loop import Row
from trivet.chat import Chat
from trivet.config import UserError
from trivet.disk import Journal
from trivet.engine import PREFIX_BYTES, Engine
from trivet.messages import Sampling
from trivet.model import Routing, Transformer
from trivet.model.lora import adapter_parameters, fingerprint
from trivet.rl.climb import climb, set_standings, standings
from trivet.rl.config import RLConfig
from trivet.rl.objectives import Totals, advantages, find_objective, policy_loss
from trivet.rl.reference import Reference
from trivet.rl.rewards import Reward
from trivet.rl.rollout import Attempt, Job, draw_problems, play
from trivet.rl.summary import describe
from trivet.rl.update import Packed, pack
from trivet.tasks import Task
from trivet.train.checkpoint import load_latest, save_state
from trivet.train.data import stable_hash
from trivet.train.losses import token_logprobs
from trivet.train.optim import Optimizer, clip, schedule
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


@dataclass
class _Update:
    """What one optimizer step adds up to over its microbatches. `first` is kept for later updates."""

    metrics: dict[str, Tensor] = field(default_factory=dict)
    loads: list[Tensor] = field(default_factory=list)
    mismatch: tuple[float, float] = (0.0, 0.0)  # largest |log ratio|, mean k3

    def add(self, metrics: dict[str, Tensor], loads: Sequence[Tensor]) -> None:
        for key, value in metrics.items():
            old = self.metrics.get(key, torch.zeros_like(value))
            self.metrics[key] = torch.maximum(old, value) if key == "ratio_max_abs_log" else old + value
        self.loads = [a + b for a, b in zip(self.loads, loads, strict=True)] if self.loads else list(loads)


class _Run:
    """The state of a run between two steps."""

    def __init__(
        self, model: Transformer, chat: Chat, tasks: Sequence[tuple[Task, float]], config: RLConfig, out: Path,
        device: torch.device | str, rewards: tuple[Reward, ...] = (),
    ):  # fmt: skip
        self.model, self.chat, self.tasks, self.config, self.out, self.device = model, chat, tasks, config, out, device
        self.rewards = rewards
        self.objective = find_objective(config.objective, config.overrides)
        if self.objective.normaliser == "constant" and self.objective.constant is None:
            self.objective = self.objective.model_copy(update={"constant": float(config.max_tokens)})
        if config.length > model.spec.context_length:
            raise UserError(
                f"rl.length ({config.length}) exceeds the model's context_length ({model.spec.context_length})."
            )
        self.reference = Reference(model) if self.objective.kl > 0 else None
        self.optimizer = Optimizer(model.optimizer_groups(), config.muon_lr, config.adam_lr, config.weight_decay)
        self.identity: dict[str, Any] = {
            "rl": config.model_dump(mode="json"),
            "spec": model.spec.model_dump(mode="json"),
            "tasks": [[task.name, weight] for task, weight in tasks],
        }
        for harmless in ("save_every_seconds", "tensorboard", "recompute"):
            del self.identity["rl"][harmless]
        if rewards:
            self.identity["rewards"] = [[reward.label, reward.weight] for reward in rewards]
        if adapter_parameters(model):  # a state holds the adapters only
            self.identity["base"] = fingerprint(model)
        self.step, self.seconds, self.metrics = 0, 0.0, {}
        self.journal = Journal(out / "metrics.jsonl")
        state = load_latest(out / "resume", self.identity)
        if state is not None:
            state.apply(model, self.optimizer)
            self.step, self.seconds, self.metrics = state.step, state.extra["seconds"], state.extra["metrics"]
            set_standings(tasks, state.extra.get("standings", {}))
        self.saved = self.step
        self.journal.truncate_after(self.step)
        self.board = Board(out / "tensorboard", self.step) if config.tensorboard and self.step < config.steps else None
        self.began = self.saved_at = time.perf_counter()
        model.train()

    # --- one step -------------------------------------------------------------------------------
    def one_step(self) -> dict[str, Any]:
        began = time.perf_counter()
        attempts = self.sample()
        generated = time.perf_counter()
        values = describe(attempts, self.config.group)
        self.check_graded(attempts, values)
        values |= climb(self.tasks, attempts)
        sequences, advantage, values["no_spread"] = self.choose(attempts)
        trained = sum(len(row.ids) for row in sequences)
        if sequences:
            values |= self.learn_from(sequences, advantage)
        self.step += 1
        ended = time.perf_counter()
        tokens = sum(attempt.tokens for attempt in attempts)
        return values | {
            "trained_share": len(sequences) / len(attempts),
            "seconds": self.seconds + ended - self.began,
            "seconds_generating": generated - began,
            "seconds_training": ended - generated,
            "tokens_per_second": tokens / (generated - began),
            "training_tokens_per_second": trained / (ended - generated),
        }

    def sample(self) -> list[Attempt]:
        """P x G graded episodes, a group's one after the other. A new engine: no state but the weights."""
        c = self.config
        jobs = []
        for p, (task, problem) in enumerate(draw_problems(self.tasks, c.seed, self.step, c.problems)):
            for g in range(c.group):
                sampling = Sampling(
                    temperature=c.temperature, max_tokens=c.max_tokens, thinking=c.thinking,
                    seed=stable_hash(c.seed, self.step, p, g),
                )  # fmt: skip
                jobs.append(Job(task, problem, sampling, rewards=self.rewards))
        self.model.eval()
        turns = c.max_turns > 1 and any(job.task.tools for job in jobs)  # a turn goes on from the one before
        engine = Engine(
            self.model, self.chat, min(c.max_rows, len(jobs)), c.length + 1, torch.device(self.device),
            prefix_bytes=PREFIX_BYTES if turns else 0,
        )  # fmt: skip
        attempts = play(engine, jobs, c.max_turns)
        self.model.train()
        return attempts

    def check_graded(self, attempts: Sequence[Attempt], values: dict[str, Any]) -> None:
        if values["not_ok"] > self.config.not_ok_limit * len(attempts):
            statuses = Counter(a.score.status for a in attempts if not a.score.ok)
            counts = ", ".join(f"{n} {status}" for status, n in sorted(statuses.items()))
            detail = next((a.score.detail for a in attempts if not a.score.ok and a.score.detail), "no detail")
            raise UserError(
                f"RL stopped at step {self.step}: {values['not_ok']} of {len(attempts)} answers could not be "
                f"graded ({counts}), more than not_ok_limit = {self.config.not_ok_limit:g}. The first: {detail}"
            )

    def choose(self, attempts: Sequence[Attempt]) -> tuple[list[Row], Tensor, float]:
        """Rows worth learning from, their advantages [S], and the share of groups that agree."""
        shape = (self.config.problems, self.config.group)
        rewards = torch.tensor([a.score.value for a in attempts]).view(shape)
        ok = torch.tensor([a.score.ok for a in attempts]).view(shape)
        value, spread = advantages(torch.where(ok, rewards, 0.0), ok, self.objective.advantage)
        kept = (ok & spread[:, None]).flatten()
        rows = [a.row for a, keep in zip(attempts, kept.tolist(), strict=True) if keep]
        wrote = torch.tensor([any(row.trained) for row in rows], dtype=torch.bool)
        rows = [row for row in rows if any(row.trained)]
        return rows, value.flatten()[kept][wrote], 1 - spread.float().mean().item()

    # --- the update -----------------------------------------------------------------------------
    def learn_from(self, rows: Sequence[Row], advantage: Tensor) -> dict[str, Any]:
        """updates_per_batch optimizer steps on the batch; metrics of the first, plus the last ratio."""
        c = self.config
        parts = [part.to(self.device) for part in pack(rows, c.rows, c.length)]
        totals = Totals(sum(len(part.sampler) for part in parts), len(rows))
        advantage = advantage.to(self.device)
        values: dict[str, Any] = {}
        for update in range(c.updates_per_batch):
            done = self.backward(parts, advantage, totals, first=update == 0)
            norm = clip(self.optimizer.parameters(), c.clip).item()
            result = {key: value.item() for key, value in done.metrics.items()}
            if not all(math.isfinite(v) for v in (norm, *result.values(), *done.mismatch)):
                raise UserError(
                    f"RL broke at step {self.step}: gradient norm {norm}, {result}. Lower muon_lr or adam_lr; "
                    f"the last good state is step {self.saved}."
                )
            if update == 0:
                self.check_first(result["ratio_max_abs_log"], done.mismatch[1])
                values = {
                    "loss": result.pop("loss"),
                    "ratio/max_abs_log": result.pop("ratio_max_abs_log"),
                    "mismatch/max_abs_log": done.mismatch[0],
                    "mismatch/kl": done.mismatch[1],
                    "grad_norm": norm,
                    **result,
                }
            else:
                values |= {"clip_share": result["clip_share"], "ratio/last_max_abs_log": result["ratio_max_abs_log"]}
            self.optimizer.step(schedule(self.step, c.steps, decay_share=c.decay_share))
            self.optimizer.zero_grad()
            if done.loads:
                values["expert_load"] = max((load.max() / load.mean()).item() for load in done.loads)
        return values

    def backward(self, parts: Sequence[Packed], advantage: Tensor, totals: Totals, first: bool) -> _Update:
        """Add the gradient of the whole batch, microbatch by microbatch."""
        done, worst, k3 = _Update(), 0.0, 0.0
        for part in parts:
            routing = Routing(replay=part.experts)
            logp, entropy = self._logprobs(self.model, part, routing)
            if first:
                part.old, part.experts = logp.detach(), routing.experts or None
                away = (part.old - part.sampler).double()  # k3 of a rounding error is far below fp32
                worst = max(worst, away.abs().max().item())
                k3 += (away.expm1() - away).sum().item() / totals.tokens
                if self.reference is not None:
                    with torch.no_grad():
                        part.reference = self._logprobs(self.reference, part, Routing())[0]
            assert part.old is not None
            loss, metrics = policy_loss(
                self.objective, logp, part.old, advantage, part.sequence, torch.ones_like(part.sequence, dtype=torch.bool),
                logp_ref=part.reference, entropy=entropy, totals=totals,
            )  # fmt: skip
            loss.backward()
            done.add(metrics | {"loss": loss.detach()}, routing.loads)
        done.mismatch = (worst, k3)
        return done

    def _logprobs(self, model: Transformer | Reference, part: Packed, routing: Routing) -> tuple[Tensor, Tensor]:
        """log p and entropy [N] of the tokens that the model wrote, at the temperature they were sampled at."""
        hidden = model(part.tokens, part.positions, routing=routing, recompute=self.config.recompute)  # [B,T,D]
        return token_logprobs(hidden[part.wanted], model.head_weight, part.targets, self.config.temperature)

    def check_first(self, ratio: float, mismatch: float) -> None:
        if ratio != 0:
            raise RuntimeError(f"step {self.step}: the ratio of the first update is not 1 (|log| = {ratio}): a bug")
        if mismatch > self.config.mismatch_limit:
            raise UserError(
                f"RL stopped at step {self.step}: engine and trainer disagree, KL = {mismatch:.2e} a token, more "
                f"than mismatch_limit = {self.config.mismatch_limit:g}. One of the two forward passes is wrong; "
                "if the model runs in a low precision, try fp32 or raise the limit."
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
        extra = {"seconds": self.seconds + time.perf_counter() - self.began, "metrics": self.metrics}
        extra["standings"] = standings(self.tasks)
        save_state(self.out / "resume", self.step, self.model, self.optimizer, self.identity, extra)
        self.saved, self.saved_at = self.step, time.perf_counter()

    def close(self) -> None:
        if self.board is not None:
            self.board.close()
