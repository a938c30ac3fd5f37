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
What several processes share out is in `together.py`.
Left out: critics, the routers' sequence-wise balance loss.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trivet.agent.loop import Row
from trivet.chat import Chat
from trivet.config import UserError
from trivet.disk import Journal
from trivet.model import Routing, Transformer
from trivet.rl.ahead import Ahead
from trivet.rl.climb import climb, set_standings, standings
from trivet.rl.config import RLConfig
from trivet.rl.epochs import Updates
from trivet.rl.objectives import advantages, find_objective
from trivet.rl.page import LINES, describe_episode
from trivet.rl.rewards import Reward
from trivet.rl.rollout import Attempt
from trivet.rl.sampler import Sampler, graded
from trivet.rl.source import make_sampler
from trivet.rl.summary import describe
from trivet.rl.together import Together
from trivet.rl.update import pack
from trivet.tasks import Task
from trivet.train.loop import Loop, Progress, identity_of
from trivet.train.offload import make_optimizer
from trivet.train.parallel import ranks_of

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
    progress: Progress | None = None,
    evaluate: Callable[[Transformer], dict[str, float]] | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Train `model` in place and return the last metrics. Resumes from `out`/resume if it is there.

    In a group of processes (`parallel.processes`) all call this; all end with the same model. `progress` is called in
    the first one only. `model` holds the starting weights, also on resume: they are the reference of a KL term.
    `rewards` are added to what the tasks give. `evaluate` must not depend on anything but the model. Raises Interrupted on Ctrl-C or SIGTERM,
    UserError where too many answers can't be graded, or where engine and trainer disagree.
    """
    run = _Run(model.to(device), chat, tasks, config, Path(out), device, rewards)
    try:
        return run.loop.run(
            run.one_step, progress, evaluate=partial(evaluate, model) if evaluate else None, keep=run.keep,
            eval_every=config.eval_every,
        )  # fmt: skip
    finally:
        run.sampler.close()


class _Run:
    """What steps depend on: a policy, and what samples and judges its episodes."""

    def __init__(
        self, model: Transformer, chat: Chat, tasks: Sequence[tuple[Task, float]], config: RLConfig, out: Path,
        device: torch.device | str, rewards: tuple[Reward, ...] = (),
    ):  # fmt: skip
        self.model, self.chat, self.tasks, self.config, self.device = model, chat, tasks, config, device
        self.objective = find_objective(config.objective, config.overrides)
        if self.objective.normaliser == "constant" and self.objective.constant is None:
            self.objective = self.objective.model_copy(update={"constant": float(config.max_tokens)})
        if config.length > model.spec.context_length:
            raise UserError(
                f"rl.length ({config.length}) exceeds the model's context_length ({model.spec.context_length})."
            )
        self.optimizer = make_optimizer(
            config.offload, model.optimizer_groups(), config.muon_lr, config.adam_lr, config.weight_decay
        )
        self.ranks = ranks_of(1, 1)
        self.updates = Updates(model, self.objective, self.optimizer, config, device, self.ranks)
        identity = {
            "rl": config.identity(), **identity_of(model), "tasks": [[task.name, weight] for task, weight in tasks],
        }  # fmt: skip
        if rewards:
            identity["rewards"] = [[reward.label, reward.weight] for reward in rewards]
        self.sampler: Sampler | Ahead
        if self.ranks.world > 1:
            self.sampler = Together(model, chat, tasks, config, device, rewards, self.ranks)
        elif config.lag:
            self.sampler = Ahead(model, chat, tasks, config, device, out / "ahead", rewards)
        else:
            self.sampler = make_sampler(model, chat, tasks, config, device, rewards)
        self.rollouts = Journal(out / LINES)
        self.loop = Loop(model, self.optimizer, config, out, identity, ranks=self.ranks, journals=[self.rollouts])
        if self.loop.kept is not None:
            set_standings(tasks, self.loop.kept.get("standings", {}))
            self.sampler.load(self.loop.step, self.loop.kept["carried"])

    # --- one step -------------------------------------------------------------------------------
    def one_step(self, step: int) -> dict[str, Any]:
        began = time.perf_counter()
        batch = self.sampler.sample(step)
        generated, attempts = time.perf_counter(), batch.attempts
        values = describe(attempts) | batch.counts
        self.check_graded(attempts, values, step)
        values |= climb(self.tasks, attempts)
        sequences, advantage, values["no_spread"] = self.choose(attempts)
        if self.ranks.first and self.config.page_every and (step + 1) % self.config.page_every == 0:
            self.record(attempts, step)
        trained = sum(len(row.ids) for row in sequences)
        if sequences:
            values |= self.updates.learn_from(sequences, advantage, step)
        ended = time.perf_counter()
        return values | {
            "trained_share": len(sequences) / len(attempts),
            "seconds_generating": generated - began,
            "seconds_training": ended - generated,
            "tokens_per_second": batch.tokens / batch.seconds,
            "training_tokens_per_second": trained / (ended - generated),
        }

    def check_graded(self, attempts: Sequence[Attempt], values: dict[str, Any], step: int) -> None:
        if values["not_ok"] > self.config.not_ok_limit * len(attempts):
            statuses = Counter(a.score.status for a in attempts if not a.score.ok)
            counts = ", ".join(f"{n} {status}" for status, n in sorted(statuses.items()))
            detail = next((a.score.detail for a in attempts if not a.score.ok and a.score.detail), "no detail")
            raise UserError(
                f"RL stopped at step {step}: {values['not_ok']} of {len(attempts)} answers could not be "
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
    def record(self, attempts: Sequence[Attempt], step: int) -> None:
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
            self.rollouts.append(step + 1, **describe_episode(attempt, self.chat, i // c.group, advantage, *seen[i]))

    def keep(self, step: int) -> dict[str, Any]:
        return {"carried": self.sampler.dump(step), "standings": standings(self.tasks)}
