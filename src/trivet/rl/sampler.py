"""Where the episodes of a step come from.

    step s:  draw P problems -> play G episodes of each -> grade
             `dynamic` rounds: as many new problems as groups without spread, until P groups have one

Dynamic sampling is DAPO's (arXiv 2503.14476): a group whose rewards agree has advantage 0 throughout, so as
a model gets better its batches get smaller and their gradient noisier. DAPO draws whole batches until one is
full and drops what is over; here a round draws exactly what is missing, so nothing that teaches is dropped.
All that was drawn is counted: rewards and `no_spread` are of every group, not of the hard ones that were kept.

`halt_repeating` ends an answer that repeats itself (MiniMax-M1, arXiv 2506.13585: after 3,000 tokens in a row of
probability > 0.99 each). Such an answer is graded as it stands and trained on like any other. It never came to an
end, so it earns what an unfinished answer earns, and its group teaches that it should; masked, a loop would cost
nothing. Its certain tokens move little by themselves: the gradient of log p is in proportion to 1 - p.

What is drawn is a pure function of (weights, seed, s). Replacements come from the whole mixture of tasks, so
a task that is solved gives way to the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from trivet.chat import Chat
from trivet.engine import PREFIX_BYTES, Engine
from trivet.messages import Sampling
from trivet.model import Transformer
from trivet.rl.config import RLConfig
from trivet.rl.objectives import advantages
from trivet.rl.precision import sampling_model
from trivet.rl.rollout import Attempt, Job, draw_problems, play
from trivet.tasks import Task
from trivet.train.data import stable_hash


@dataclass(frozen=True)
class Batch:
    """Graded episodes, those of a group one after the other, and what it took to get them."""

    attempts: list[Attempt]
    counts: dict[str, Any] = field(default_factory=dict)  # metrics


class Sampler:
    """Samples the batches of a run. No state but the weights of `model`."""

    def __init__(
        self, model: Transformer, chat: Chat, tasks: Sequence[tuple[Task, float]], config: RLConfig,
        device: torch.device | str,
    ):  # fmt: skip
        self.model, self.chat, self.tasks, self.config, self.device = model, chat, tasks, config, device

    def sample(self, step: int) -> Batch:
        """The batch of a step, by the weights as they are."""
        c = self.config
        self.model.eval()
        engine = self._engine(c.problems * c.group)
        attempts: list[Attempt] = []
        drawn, missing, rounds = 0, c.problems, 0
        while missing and rounds < c.dynamic:
            attempts += play(engine, self._jobs(step, drawn, missing), c.max_turns)
            drawn, rounds = drawn + missing, rounds + 1
            missing = c.problems - int(spread(attempts, c.group).sum())
        self.model.train()
        return Batch(attempts, {"rounds": rounds, "drawn": drawn} if c.dynamic > 1 else {})

    def _jobs(self, step: int, first: int, count: int) -> list[Job]:
        """The episodes of the problems `first` to `first` + `count` of a step, a group's one after the other."""
        c = self.config
        return [
            Job(task, problem, Sampling(
                temperature=c.temperature, top_p=c.top_p, top_k=c.top_k, min_p=c.min_p, keep_sets=True,
                max_tokens=c.max_tokens, thinking=c.thinking, halt_repeating=c.halt_repeating,
                seed=stable_hash(c.seed, step, first + p, g),
            ))
            for p, (task, problem) in enumerate(draw_problems(self.tasks, c.seed, step, count, first))
            for g in range(c.group)
        ]  # fmt: skip

    def _engine(self, episodes: int) -> Engine:
        """A new one: nothing is left of other weights."""
        c = self.config
        turns = c.max_turns > 1 and any(task.tools for task, _ in self.tasks)  # a turn goes on from the one before
        return Engine(
            sampling_model(self.model, c), self.chat, min(c.max_rows, episodes), c.length + 1, torch.device(self.device),
            record_experts=c.replay == "sampler", prefix_bytes=PREFIX_BYTES if turns else 0,
        )  # fmt: skip


def rewards(attempts: Sequence[Attempt], group: int) -> tuple[Tensor, Tensor]:
    """Of the groups, rewards [P,G], 0 where there is none, and whether there is one [P,G]."""
    ok = torch.tensor([a.score.ok for a in attempts]).view(-1, group)
    value = torch.tensor([a.score.value for a in attempts]).view(-1, group)
    return torch.where(ok, value, 0.0), ok


def spread(attempts: Sequence[Attempt], group: int) -> Tensor:
    """[P]: which groups teach something, whatever the objective makes of it."""
    return advantages(*rewards(attempts, group), "mean")[1]
