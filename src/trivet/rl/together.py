"""RL on several processes that torchrun started: the same steps as on one, each process doing its share of them.

    all       hold the policy, draw the same problems
    process n plays the groups n, n + N, n + 2N, ... on an engine of its own, and grades them
    all       hand each other what they played: the same rewards, advantages, minibatches everywhere
    process n computes the rows n, n + N, ... of each minibatch (`update.pack`)
    all       add up their gradients and take the same optimizer step; the first one logs and saves

A job brings its seed and the engine gives it the same tokens in any batch, so who plays it changes nothing. Divisors are
those of the whole minibatch, so gradients are summed, never averaged. A saved state is one of a single process, and any
number of them goes on from it.

Left out: a policy that is divided over processes (each holds all of it, with its optimizer and a KL term's reference);
episodes from elsewhere, or of older weights.
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
from trivet.train.parallel import Ranks

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

    def _player(self) -> Player:
        c, world = self.config, self.ranks.world
        engine = self._engine(-(-c.problems // world) * c.group)

        def play_all(jobs: Sequence[Job]) -> list[Attempt]:
            """Attempts at all jobs, in their order. What stops one process stops all."""
            mine = [
                job for i, job in enumerate(jobs) if i // c.group % world == self.ranks.rank
            ]  # groups share prompts
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
            return [Attempt(job, *next(shares[i // c.group % world])) for i, job in enumerate(jobs)]

        return play_all
