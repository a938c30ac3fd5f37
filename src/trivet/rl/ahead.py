"""Sampling one batch ahead, in a process of its own, while the update learns from the one before.

    weights after step    0          0          1          2
    sample batch          0          1          2          3        this process and the other one, side by side
    update with batch                0          1          2

So the batch of step s is by the weights after s - 2 steps that the trainer has taken, not s - 1: it is one step
stale, always, whatever is faster. Nothing is a race, and the same run gives the same bits. Of stale tokens the
ratio's denominator is what the engine recorded (see epochs.py); the first batch is fresh, and is where engine and
trainer are compared.

Weights are handed over in shared memory, between two batches. The state on disk holds the weights that sample the
batch that is under way, so a run that is started again samples it again.

Left out: a lag of more than one.
"""

from __future__ import annotations

import copy
import multiprocessing
import os
import shutil
import threading
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from trivet.chat import Chat
from trivet.config import UserError
from trivet.disk import atomic_dir
from trivet.model import Transformer
from trivet.model.io import save_tensors
from trivet.rl.config import RLConfig
from trivet.rl.rewards import Reward
from trivet.rl.rollout import rewarded
from trivet.rl.sampler import Batch, Sampler, learning
from trivet.rl.source import make_sampler
from trivet.tasks import Climber, Task

KEPT = 2  # states, as of training


class Ahead:
    """A Sampler that has begun with the next batch when it hands out one.

    folder: where the weights of a batch that is under way are kept beside the states of the run.
    """

    def __init__(
        self, model: Transformer, chat: Chat, tasks: Sequence[tuple[Task, float]], config: RLConfig,
        device: torch.device | str, folder: Path, rewards: tuple[Reward, ...] = (),
    ):  # fmt: skip
        if rewards and config.dynamic > 1:
            raise UserError(
                "With rl.lag = 1 reward terms are added when a batch arrives, too late to tell which groups rl.dynamic "
                "must replace: leave one of the three out."
            )
        if any(isinstance(task, Climber) for task, _ in tasks):
            raise UserError("A curriculum waits for the scores of a step, which sampling ahead does not: rl.lag = 0.")
        self.rewards = rewards
        if multiprocessing.current_process().daemon:
            raise UserError(
                "rl.lag = 1 needs a process of its own, and this stage is one that runs beside others: give it all "
                "of the recipe's threads, or set rl.lag = 0."
            )
        self.model, self.config, self.folder = model, config, folder
        self.shared = {name: p.detach().to("cpu", copy=True).share_memory_() for name, p in learning(model)}
        self._job = (copy.deepcopy(model).to("cpu"), chat, list(tasks), config, str(device))
        self._process: BaseProcess | None = None
        self._asked = -1  # the step whose batch is under way

    def sample(self, step: int) -> Batch:
        """The batch of a step, and begin the next one by the weights as they are now."""
        if self._asked < 0:
            self._ask(step)
        assert self._asked == step
        batch = self._hear()
        if self.rewards:  # terms may hold models, so they stay in this process
            batch = replace(batch, attempts=rewarded(batch.attempts, self.rewards))
        if step + 1 < self.config.steps:
            for name, p in learning(self.model):
                self.shared[name].copy_(p.detach())
            self._ask(step + 1)
        if step == 0:
            return batch
        attempts = [
            replace(a, stale=(True,) * sum(len(c.tokens) for c in a.episode.completions)) for a in batch.attempts
        ]
        return replace(batch, attempts=attempts)

    # --- state --------------------------------------------------------------------------------------
    def dump(self, step: int) -> list[str]:
        """Before the state after `step` steps is saved: the weights of the batch that it goes on with."""
        if self._asked == step:
            with atomic_dir(self._weights(step)) as aside:
                save_tensors(self.shared, aside / "model.safetensors")
            for old in sorted(self.folder.glob("step-*"))[:-KEPT]:
                shutil.rmtree(old)
        return []

    def load(self, step: int, records: Sequence[str]) -> None:
        if step < self.config.steps:
            file = self._weights(step) / "model.safetensors"
            try:
                stored = load_file(file)
            except OSError as e:
                raise UserError(f"{file}, of the batch that was under way, can't be read: {e}.") from None
            for name, tensor in self.shared.items():
                tensor.copy_(stored[name])
            self._ask(step)

    def _weights(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    # --- the other process --------------------------------------------------------------------------
    def _ask(self, step: int) -> None:
        if self._process is None:
            context = multiprocessing.get_context("spawn")
            self._pipe, theirs = context.Pipe()
            job = (*self._job, self.shared, torch.get_num_threads())
            self._process = context.Process(target=_work, args=(theirs, *job), daemon=True)
            self._process.start()
            theirs.close()  # so that its death is an end of file here
        self._asked = step
        with suppress(BrokenPipeError):  # it died: `_hear` says so
            self._pipe.send(step)

    def _hear(self) -> Batch:
        assert self._process is not None
        try:
            said = self._pipe.recv()
        except (EOFError, OSError):
            self._process.join()
            raise UserError(
                f"The process that samples died (exit code {self._process.exitcode}): out of memory, or killed. The "
                "same command goes on from the last saved state."
            ) from None
        if isinstance(said, BaseException):
            raise said
        batch: Batch = said
        return batch

    def close(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.join()
            self._pipe.close()


def _work(
    pipe: Connection, model: Transformer, chat: Chat, tasks: list[tuple[Task, float]], config: RLConfig, device: str,
    shared: dict[str, Tensor], threads: int,
) -> None:  # fmt: skip
    """Sample the batches that are asked for, each by the weights that are in `shared` then."""
    with suppress(OSError):
        os.setpgid(0, 0)  # a terminal's Ctrl-C is the parent's matter
    torch.set_num_threads(threads)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    model = model.to(device)
    sampler: Sampler | None = None
    while True:
        try:
            step = pipe.recv()
        except EOFError:
            return
        try:
            with torch.no_grad():
                for name, p in learning(model):
                    p.copy_(shared[name])
            if sampler is None:  # here, where it is told what goes wrong
                sampler = make_sampler(model, chat, tasks, config, device)
            pipe.send(sampler.sample(step))
        except UserError as e:
            pipe.send(e)
        except Exception as e:  # told as text, for not every exception can be sent
            pipe.send(RuntimeError("".join(traceback.format_exception(e))))


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
