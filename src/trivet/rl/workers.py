"""Episodes played by Ray actors, on this machine or on many.

    driver    draws problems, deals groups:   worker n of N plays the groups n, n + N, n + 2N, ...
    actor     a copy of the model and an engine of its own: plays, uses tools, grades by the task
    driver    adds reward terms (they may hold models), puts the episodes back in order, learns

Weights are put into Ray's store once a step, which keeps one copy a node, however many actors read it. Every
episode is drawn by its own seed, and the engine gives it the same tokens in any batch, so it is the same whoever
plays it: in fp32 a run has the bits of one that is played here, with any number of workers, after any restart. The
one exception: recorded log-probabilities of recurrent layers (lightning, delta) may differ by rounding with the
batch, which `mismatch/*` shows, and which only tokens of older weights (`rl.lag`) and `rl.correction` learn from.

An actor that dies is started again, where Ray finds room, and its share is played once more; `workers/restarted`
counts it. One that finds no room is given up with a warning, and the others play its share. With `rl.lag` the
process that samples ahead has the workers. Left out: partial steps (where one is cut depends on what else is in an
engine's batch), models that several actors share, autoscaling.
"""

from __future__ import annotations

import copy
import logging
import os
import signal
import socket
import threading
import warnings
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trivet.agent.loop import Episode
from trivet.chat import Chat
from trivet.config import UserError
from trivet.messages import Sampling, Score
from trivet.model import Transformer
from trivet.rl.config import RLConfig
from trivet.rl.rewards import Reward
from trivet.rl.rollout import Attempt, Job, add_all, play
from trivet.rl.sampler import Batch, Player, Sampler, learning
from trivet.tasks import Problem, Task

READY = 120.0  # seconds that an actor may take to load torch and its model
TRIES = 3  # actors that may die of one share

Weights = dict[str, np.ndarray]  # bytes, which every type of number has
Played = list[tuple[Episode, Score]]


@dataclass(frozen=True)
class Share:
    """What one actor plays: the numbers of its jobs, and of each the number of its task, the problem and how."""

    numbers: list[int]
    jobs: list[tuple[int, Problem, Sampling]]


class Actor:
    """In a process of its own: one model, one engine a share."""

    def __init__(
        self, model: Transformer, chat: Chat, tasks: Sequence[tuple[Task, float]], config: RLConfig, device: str,
        threads: int,
    ):  # fmt: skip
        torch.set_num_threads(threads)
        self.sampler = Sampler(model.to(device).eval(), chat, tasks, config, device)

    def ready(self) -> bool:
        return True

    def play(self, weights: Weights, share: Share) -> Played | UserError:
        s = self.sampler
        with torch.no_grad():
            for name, p in learning(s.model):
                p.copy_(torch.tensor(weights[name]).view(p.dtype).view(p.shape))
        jobs = [Job(s.tasks[task][0], problem, sampling) for task, problem, sampling in share.jobs]
        try:
            return [(a.episode, a.score) for a in play(s._engine(len(jobs)), jobs, s.config.max_turns)]
        except UserError as e:  # as a value: Ray would put its traceback around it
            return e


class Workers(Sampler):
    """A Sampler whose episodes are played by `config.workers` actors."""

    def __init__(
        self, model: Transformer, chat: Chat, tasks: Sequence[tuple[Task, float]], config: RLConfig,
        device: torch.device | str, rewards: tuple[Reward, ...] = (),
    ):  # fmt: skip
        super().__init__(model, chat, tasks, config, device, rewards)
        self.threads, self.restarted = torch.get_num_threads(), 0
        self.crew: list[Any] = []
        self.ray, self._ours = connect(config, self.threads, torch.device(device))
        job = (copy.deepcopy(model).to("cpu"), chat, list(tasks), config, str(device), self.threads)
        self._job = [self.ray.put(part) for part in job]
        try:
            self.crew = self._actors(config.workers)
            if len(self.crew) < config.workers:
                raise UserError(
                    f"{config.workers - len(self.crew)} of rl.workers = {config.workers} were not there after {READY:.0f} s: "
                    "see that Ray's nodes are free and that trivet is installed on them, or ask for fewer."
                )
        except BaseException:
            self.close()
            raise

    def sample(self, step: int) -> Batch:
        before = self.restarted
        batch = super().sample(step)
        return replace(batch, counts=batch.counts | {"workers/restarted": self.restarted - before})

    def _player(self) -> Player:
        weights = self.ray.put({name: _bytes(p) for name, p in learning(self.model)})
        return lambda jobs: self._spread(jobs, weights)

    def _spread(self, jobs: Sequence[Job], weights: Any) -> list[Attempt]:
        """Attempts at all jobs, in their order."""
        waiting = deque((share, 0) for share in self._deal(jobs))
        running: dict[Any, tuple[Any, Share, int]] = {}
        idle, played = list(self.crew), dict[int, tuple[Episode, Score]]()
        while waiting or running:
            while waiting and idle:
                (share, deaths), actor = waiting.popleft(), idle.pop()
                running[actor.play.remote(weights, share)] = actor, share, deaths
            (done, *_), _ = self.ray.wait(list(running))
            actor, share, deaths = running.pop(done)
            try:
                found = self.ray.get(done)
            except self.ray.exceptions.RayTaskError:  # raised by our own code
                raise
            except self.ray.exceptions.RayError as e:
                if deaths + 1 == TRIES:
                    raise UserError(
                        f"{TRIES} workers died of the same episodes; the last one: {e} If memory ran out, lower "
                        "rl.max_rows. The same command goes on from the last saved state."
                    ) from None
                waiting.append((share, deaths + 1))
                idle += self._replace(actor)
                continue
            if isinstance(found, UserError):
                raise found
            played.update(zip(share.numbers, found, strict=True))
            idle.append(actor)
        episodes, scores = zip(*(played[i] for i in range(len(jobs))), strict=True)
        return [Attempt(*a) for a in zip(jobs, episodes, add_all(jobs, episodes, list(scores)), strict=True)]

    def _deal(self, jobs: Sequence[Job]) -> list[Share]:
        """Whole groups, for an engine computes a group's prompt once; in turn, for tasks are drawn one after the other."""
        number = {id(task): i for i, (task, _) in enumerate(self.tasks)}
        group, count = self.config.group, len(self.crew)
        shares = []
        for first in range(min(count, len(jobs) // group)):
            numbers = [i for i in range(len(jobs)) if i // group % count == first]
            shares.append(
                Share(numbers, [(number[id(j.task)], j.problem, j.sampling) for j in (jobs[i] for i in numbers)])
            )
        return shares

    # --- actors -------------------------------------------------------------------------------------
    def _actors(self, count: int) -> list[Any]:
        """New ones, as many as come up in time. UserError where one can't be made."""
        gpus = int(torch.device(self.device).type == "cuda")
        made = self.ray.remote(num_cpus=self.threads, num_gpus=gpus, scheduling_strategy="SPREAD")(Actor)
        actors = {actor.ready.remote(): actor for actor in (made.remote(*self._job) for _ in range(count))}
        done, late = self.ray.wait(list(actors), num_returns=count, timeout=READY)
        for one in late:
            self.ray.kill(actors[one])
        try:
            self.ray.get(done)
        except self.ray.exceptions.RayActorError as e:
            raise UserError(f"A worker could not be started: {e}") from None
        return [actors[one] for one in done]

    def _replace(self, dead: Any) -> list[Any]:
        """A new actor in the place of one, in a list that is empty where Ray has no room."""
        self.ray.kill(dead)
        self.crew.remove(dead)
        self.restarted += 1
        new = self._actors(1)
        self.crew += new
        if new:
            return new
        if not self.crew:
            raise UserError("The last worker died, and Ray has no room for another: the same command goes on later.")
        warnings.warn(f"Ray has no room to start a worker again: {len(self.crew)} play on.", stacklevel=2)
        return []

    def close(self) -> None:
        for actor in self.crew:
            self.ray.kill(actor)
        self.crew = []
        if self._ours:
            self.ray.shutdown()


def connect(config: RLConfig, threads: int, device: torch.device) -> tuple[Any, bool]:
    """Ray, connected to, and whether that is our doing. Raises UserError where it isn't there or is too small."""
    try:
        import ray
    except ImportError:
        raise UserError("rl.workers needs Ray: pip install 'trivet[ray]'") from None
    ours = not ray.is_initialized()
    if ours:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would report to its makers
        on_term = signal.getsignal(signal.SIGTERM)
        local = config.ray_address is None
        try:
            _knock(config.ray_address or "")
            ray.init(
                address=config.ray_address or "local", num_cpus=config.workers * threads if local else None,
                include_dashboard=False if local else None, logging_level=logging.WARNING, log_to_driver=False,
            )  # fmt: skip
        except OSError as e:  # ConnectionError of Ray's is one
            raise UserError(f"rl.ray_address = {config.ray_address!r}: no Ray there: {e}") from None
        if threading.current_thread() is threading.main_thread():  # Ray would answer with a stack trace
            signal.signal(signal.SIGTERM, on_term)
    for what, needed in (("CPU", threads), ("GPU", int(device.type == "cuda"))):
        there = int(ray.cluster_resources().get(what, 0))
        if there < config.workers * needed:
            if ours:
                ray.shutdown()
            raise UserError(
                f"rl.workers = {config.workers} of {needed} {what} each need {config.workers * needed}, and Ray has "
                f"{there}: add nodes, or ask for fewer workers or threads."
            )
    return ray, ours


def _knock(address: str) -> None:
    """Raises OSError where nobody listens: Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if port.isdigit():
        socket.create_connection((host, int(port)), timeout=5).close()


def _bytes(p: Tensor) -> np.ndarray:
    return p.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
