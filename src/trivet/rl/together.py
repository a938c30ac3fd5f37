"""RL on several processes that torchrun started: the same steps as on one, each process doing its share of them.

    all       hold the policy (or a part of it), draw the same problems
    process n plays the groups n, n + N, n + 2N, ... on an engine of its own, and grades them
    all       hand each other what they played: the same rewards, advantages, minibatches everywhere
    process n computes the rows n, n + N, ... of each minibatch (`update.pack`)
    all       add up their gradients and take the same optimizer step; the first one logs and saves

A job brings its seed and the engine gives it the same tokens in any batch, so who plays it changes nothing. Divisors are
those of the whole minibatch, so gradients are summed, never averaged. Any number of processes goes on from a saved state.

`rl.shards` processes may divide the policy, its gradients and its optimizer (FSDP, `train/parallel.py`). While episodes are
played each holds a whole copy, as it does of a KL term's reference. Of a divided policy every pass is one of all processes,
so one with fewer rows than the others goes along with a row that counts for nothing.

Left out: experts on several processes; episodes from elsewhere, or of older weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from trivet.agent.loop import Episode
from trivet.chat import Chat
from trivet.config import UserError
from trivet.messages import Score
from trivet.model import Transformer
from trivet.rl.config import RLConfig
from trivet.rl.rewards import Reward
from trivet.rl.rollout import Attempt, Job, play
from trivet.rl.sampler import Player, Sampler
from trivet.tasks import Task
from trivet.train.parallel import Ranks, gathered

Played = list[tuple[Episode, Score]]


class Together(Sampler):
    """A Sampler whose episodes all processes play, each its share; each of them gets all."""

    def __init__(
        self, model: Transformer, chat: Chat, tasks: Sequence[tuple[Task, float]], config: RLConfig,
        device: torch.device | str, rewards: tuple[Reward, ...], ranks: Ranks,
    ):  # fmt: skip
        elsewhere = {
            "lag": config.lag > 0, "partial": config.partial < 1, "workers": config.workers > 0,
            "server": config.server is not None,
        }  # fmt: skip
        for name in (name for name, given in elsewhere.items() if given):
            raise UserError(
                f"rl.{name} is another way to share out the sampling than the {ranks.world} processes that torchrun "
                "started: leave it out, or start one process."
            )
        super().__init__(model, chat, tasks, config, device, rewards)
        self.ranks = ranks

    def _policy(self) -> Transformer:
        """For as long as a step's episodes are played, all of it is here."""
        whole = gathered(self.model, everywhere=True)
        assert whole is not None
        return whole.to(self.device).eval()

    def _player(self) -> Player:
        c, world = self.config, self.ranks.world
        engine = self._engine(-(-c.problems // world) * c.group)

        def play_all(jobs: Sequence[Job]) -> list[Attempt]:
            """Attempts at all jobs, in their order. What stops one process stops all."""
            owner = [i // c.group % world for i in range(len(jobs))]  # of whole groups, which share their prompts
            mine = [job for job, rank in zip(jobs, owner, strict=True) if rank == self.ranks.rank]
            played: Played | UserError
            try:
                played = [(a.episode, a.score) for a in play(engine, mine, c.max_turns)]
            except UserError as e:
                played = e
            shares = []
            for share in self.ranks.gather(played):
                if isinstance(share, UserError):
                    raise share
                shares.append(iter(share))
            return [Attempt(job, *next(shares[rank])) for job, rank in zip(jobs, owner, strict=True)]

        return play_all
