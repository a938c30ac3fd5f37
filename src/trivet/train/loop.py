"""What a run of steps is besides its steps: it resumes, logs, saves, and stops when it is asked to.

    loop = Loop(model, optimizer, steps, out, identity)
    loop.run(one_step, progress)            one_step(s) -> metrics; a pure function of (weights, optimizer, s)

A run that was killed at any moment and is started again by the same call ends with the same bits.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trivet.config import UserError
from trivet.disk import Journal
from trivet.train.checkpoint import load_latest, save_state
from trivet.train.data import stable_hash
from trivet.train.optim import Optimizer
from trivet.train.trainer import Deferred, Interrupted


class Loop:
    """The state of a run between two steps. `identity` is what must not change between a run and its resumption."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        steps: int,
        out: Path,
        identity: Mapping[str, Any],
        save_every_seconds: float = 60.0,
    ) -> None:
        self.model, self.optimizer, self.steps, self.out = model, optimizer, steps, Path(out)
        self.identity, self.save_every = identity, save_every_seconds
        self.step, self.seconds, self.metrics = 0, 0.0, dict[str, Any]()
        self.journal = Journal(self.out / "metrics.jsonl")
        state = load_latest(self.out / "resume", identity)
        if state is not None:
            state.apply(model, optimizer)
            self.step, self.seconds, self.metrics = state.step, state.extra["seconds"], state.extra["metrics"]
        self.saved = self.step
        self.journal.truncate_after(self.step)
        self.began = self.saved_at = time.perf_counter()

    def run(
        self, one_step: Callable[[int], Mapping[str, Any]], progress: Callable[[dict[str, Any]], None] | None = None
    ) -> dict[str, Any]:
        """All steps that are left -> the last metrics. torch is seeded with (seed of the identity, step) at each."""
        try:
            with Deferred() as asked:
                while self.step < self.steps:
                    torch.manual_seed(stable_hash(self.identity.get("seed", 0), self.step))
                    self._log(one_step(self.step), progress)
                    last = self.step == self.steps
                    if last or asked.stop or time.perf_counter() - self.saved_at >= self.save_every:
                        self._save()
                    if asked.stop and not last:
                        raise KeyboardInterrupt
        except KeyboardInterrupt:
            raise Interrupted(
                f"Stopped; step {self.saved} of {self.steps} is saved in {self.out}. "
                "The same command goes on from there."
            ) from None
        return self.metrics

    def _log(self, values: Mapping[str, Any], progress: Callable[[dict[str, Any]], None] | None) -> None:
        bad = [name for name, value in values.items() if isinstance(value, float) and not math.isfinite(value)]
        if bad:
            raise UserError(
                f"Step {self.step + 1} broke: {bad[0]} is {values[bad[0]]}. Lower the learning rates; "
                f"the last good state is step {self.saved}."
            )
        self.step += 1
        seconds = self.seconds + time.perf_counter() - self.began
        self.metrics = {"step": self.step, **values, "seconds": seconds}
        self.journal.append(**self.metrics)
        if progress is not None:
            progress(self.metrics | {"steps": self.steps})

    def _save(self) -> None:
        if not all(bool(torch.isfinite(p).all()) for p in self.optimizer.parameters()):
            raise UserError(
                f"The weights are not finite after step {self.step}, so that state was not saved; the last good one "
                f"is step {self.saved}. Lower the learning rates."
            )
        self.journal.sync()
        extra = {"seconds": self.metrics["seconds"], "metrics": self.metrics}
        save_state(self.out / "resume", self.step, self.model, self.optimizer, self.identity, extra)
        self.saved, self.saved_at = self.step, time.perf_counter()
