"""What every run of steps is besides its steps: it resumes, logs, evaluates, saves, and stops when it is asked to.

    loop = Loop(model, optimizer, config, out, identity)
    loop.run(one_step, progress)            one_step(s) -> metrics; a pure function of (weights, optimizer, s)

A run that is stopped at any moment, by Ctrl-C or kill -9, and started again by the same call ends with the same bits and
the same metrics as one that was never stopped (times excepted): randomness is seeded at every step, saving changes nothing.

On several processes (`parallel.py`) all call this together. They stop and save after the same step, and the first logs.
"""

from __future__ import annotations

import math
import signal
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Self

import torch
from pydantic import Field
from torch import nn

from trivet.config import UserError
from trivet.disk import Journal
from trivet.model import Transformer
from trivet.model.lora import adapter_parameters, fingerprint
from trivet.spec import Free, Frozen
from trivet.train.checkpoint import load_latest, save_state
from trivet.train.data import stable_hash
from trivet.train.optim import Optimizer
from trivet.train.parallel import ALONE, Ranks, local

Metrics = Mapping[str, Any]
Progress = Callable[[dict[str, Any]], None]


class RunConfig(Frozen):
    """What every run of steps is told."""

    steps: int = Field(gt=0, description="optimizer steps of the whole run")
    seed: int = Field(default=0, description="torch is seeded with (seed, step) at every step")
    save_every_seconds: Free[float] = Field(default=60.0, ge=0, description="time between saved states")
    tensorboard: Free[bool] = Field(default=True, description="write TensorBoard event files too")


class Interrupted(KeyboardInterrupt):
    """The run was stopped on request; its text says how to go on."""


class Loop:
    """The state of a run between two steps."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        config: RunConfig,
        out: Path,
        identity: Mapping[str, Any],
        *,
        ranks: Ranks = ALONE,
        journals: Sequence[Journal] = (),
    ) -> None:
        """identity: JSON values that must not change between a run and its resumption. journals: others that belong to it."""
        self.model, self.optimizer, self.config, self.out = model, optimizer, config, Path(out)
        self.identity, self.ranks = identity, ranks
        self.journal = Journal(self.out / "metrics.jsonl")
        self.journals = (self.journal, *journals)
        self.step, self.seconds, self.metrics = 0, 0.0, dict[str, Any]()
        self.kept: dict[str, Any] | None = None  # what `keep` gave when the state was saved that this run goes on from
        state = load_latest(self.out / "resume", identity, ranks)
        if state is not None:
            state.apply(model, optimizer)
            self.step, self.seconds, self.metrics = state.step, state.extra["seconds"], state.extra["metrics"]
            self.kept = state.extra
        self.saved = self.step
        if ranks.first:
            for journal in self.journals:
                journal.truncate_after(self.step)
        self.board: Board | None = None
        self.began = self.saved_at = time.perf_counter()

    @property
    def writes(self) -> bool:
        """Whether this process is going to log something."""
        return self.ranks.first and self.step < self.config.steps

    def run(
        self,
        one_step: Callable[[int], Metrics | Callable[[], Metrics]],
        progress: Progress | None = None,
        *,
        evaluate: Callable[[], Mapping[str, float]] | None = None,
        keep: Callable[[int], dict[str, Any]] = lambda step: {},
        log_every: int = 1,
        eval_every: int = 0,
    ) -> dict[str, Any]:
        """All steps that are left -> the last metrics.

        one_step: may return a function, which is called where a line is due (to read numbers off a GPU is to wait for it).
        evaluate: after every `eval_every` steps and at the end; must depend on nothing but the model.
        keep: what the next step depends on besides weights and its number, as JSON values.
        Raises Interrupted on Ctrl-C or SIGTERM, UserError where a number is not finite.
        """
        config = self.config
        self.board = Board(self.out / "tensorboard", self.step) if config.tensorboard and self.writes else None
        self.model.train()
        try:
            with Deferred() as asked:
                while self.step < config.steps:
                    torch.manual_seed(stable_hash(config.seed, self.step))
                    said = one_step(self.step)
                    self.step += 1
                    last = self.step == config.steps
                    scores: dict[str, float] = {}
                    if evaluate and (last or (eval_every and self.step % eval_every == 0)):
                        scores = self._evaluate(evaluate)
                    if last or scores or self.step % log_every == 0:
                        self._log({**(said() if callable(said) else said), **scores}, progress)
                    stop, due = self.ranks.any(
                        asked.stop, time.perf_counter() - self.saved_at >= config.save_every_seconds
                    )
                    if last or stop or due:
                        self._save(keep(self.step))
                    if stop and not last:
                        raise KeyboardInterrupt
        except KeyboardInterrupt:
            raise Interrupted(
                f"Stopped; step {self.saved} of {config.steps} is saved in {self.out}. The same command goes on from there."
            ) from None
        finally:
            if self.board is not None:
                self.board.close()
        return self.metrics

    def _evaluate(self, evaluate: Callable[[], Mapping[str, float]]) -> dict[str, float]:
        self.model.eval()
        with torch.no_grad():
            scores = evaluate()
        self.model.train()
        return {f"eval/{name}": float(value) for name, value in scores.items()}

    def _log(self, values: dict[str, Any], progress: Progress | None) -> None:
        bad = [name for name, value in values.items() if isinstance(value, float) and not math.isfinite(value)]
        if bad:
            raise UserError(
                f"Training broke at step {self.step}: {bad[0]} is {values[bad[0]]}. Lower muon_lr or adam_lr, or warm "
                f"up longer; the last good state is step {self.saved}."
            )
        values = {**values, "seconds": self._seconds()}
        self.metrics = {"step": self.step, **values}
        if not self.ranks.first:
            return
        self.journal.append(self.step, **values)
        if self.board is not None:
            self.board.write(self.step, values)
        if progress is not None:
            progress(self.metrics)

    def _save(self, kept: dict[str, Any]) -> None:
        finite = all(bool(torch.isfinite(local(p)).all()) for p in self.optimizer.parameters())
        if self.ranks.any(not finite)[0]:
            raise UserError(
                f"The weights are not finite after step {self.step}, so that state was not saved; the last good one "
                f"is step {self.saved}. Lower muon_lr or adam_lr, or warm up longer."
            )
        if self.ranks.first:
            for journal in self.journals:
                journal.sync()
        extra = {"seconds": self._seconds(), "metrics": self.metrics, **kept}
        save_state(self.out / "resume", self.step, self.model, self.optimizer, self.identity, extra, self.ranks)
        self.saved, self.saved_at = self.step, time.perf_counter()

    def _seconds(self) -> float:
        """Of the whole run, all its sittings together."""
        return self.seconds + time.perf_counter() - self.began


def identity_of(model: Transformer) -> dict[str, Any]:
    """What a state of this model belongs to. Where adapters learn it holds nothing but these, so also whose they are."""
    spec = {"spec": model.spec.model_dump(mode="json")}
    return spec | {"base": fingerprint(model)} if adapter_parameters(model) else spec


class Deferred:
    """Turns Ctrl-C and SIGTERM into `stop`, read between two steps; the second one stops at once.

    An interrupt in the middle of an update would leave weights that belong to no step.
    """

    def __init__(self) -> None:
        self.stop = False
        self._old: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # only there signals can be caught
            for number in (signal.SIGINT, signal.SIGTERM):
                self._old[number] = signal.signal(number, self._caught)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _caught(self, number: int, frame: FrameType | None) -> None:
        if self.stop:
            raise KeyboardInterrupt
        self.stop = True


class Board:
    """TensorBoard, if it is installed."""

    def __init__(self, folder: Path, step: int):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            warnings.warn(
                "TensorBoard is not installed, so only metrics.jsonl is written "
                "(pip install 'trivet[report]', or set tensorboard = false).",
                stacklevel=2,
            )
            self.writer = None
        else:
            self.writer = SummaryWriter(str(folder), purge_step=step + 1)

    def write(self, step: int, values: dict[str, Any]) -> None:
        if self.writer is not None:
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
