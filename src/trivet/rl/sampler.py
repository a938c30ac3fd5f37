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

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from trivet.agent.loop import Episode
from trivet.chat import Chat
from trivet.config import UserError
from trivet.engine import PREFIX_BYTES, Engine, EngineModel
from trivet.messages import Sampling, StopReason
from trivet.model import Transformer
from trivet.rl.carry import Key, Replay, Started, as_recorded
from trivet.rl.config import RLConfig
from trivet.rl.loss import advantages
from trivet.rl.precision import sampling_model
from trivet.rl.rewards import Reward, rewards_of
from trivet.rl.rollout import Attempt, Job, begin, draw_problems, grade_all, play
from trivet.tasks import Climber, Task
from trivet.train.data import stable_hash

Player = Callable[[Sequence[Job]], list[Attempt]]


@dataclass(frozen=True)
class Batch:
    """Graded episodes, those of a group one after the other, and what it took to get them."""

    attempts: list[Attempt]
    tokens: int  # written in this step
    counts: dict[str, Any] = field(default_factory=dict)  # metrics
    seconds: float = 0.0  # that it took


class Sampler:
    """Samples the batches of a run by the weights of `model`. Its state is what is carried: see carry.py."""

    def __init__(
        self, model: Transformer, chat: Chat, tasks: Sequence[tuple[Task, float]], config: RLConfig,
        device: torch.device | str, rewards: tuple[Reward, ...] = (),
    ):  # fmt: skip
        if config.partial < 1 and any(isinstance(task, Climber) for task, _ in tasks):
            raise UserError(
                "A curriculum changes what is asked between steps, so episodes can't be carried: partial = 1."
            )
        self.rewards = rewards
        self.model, self.chat, self.tasks, self.config, self.device = model, chat, tasks, config, device
        self.carried: list[Started] = []  # of groups that are not complete
        self._episodes: dict[Key, tuple[Job, Episode]] = {}  # those of them that are done

    def sample(self, step: int) -> Batch:
        """The batch of a step, by the weights as they are."""
        began = time.perf_counter()
        self.model.eval()
        batch = self._rounds(step) if self.config.partial == 1 else self._part(step)
        self.model.train()
        return replace(batch, seconds=time.perf_counter() - began)

    def _rounds(self, step: int) -> Batch:
        c, play_all = self.config, self._player()
        attempts: list[Attempt] = []
        drawn, missing, rounds = 0, c.problems, 0
        while missing and rounds < c.dynamic:
            attempts += play_all(self._jobs(step, drawn, missing))
            drawn, rounds = drawn + missing, rounds + 1
            missing = c.problems - int(spread(attempts, c.group).sum())
        counts = {"rounds": rounds, "drawn": drawn} if c.dynamic > 1 else {}
        return Batch(attempts, sum(attempt.tokens for attempt in attempts), counts)

    def _player(self) -> Player:
        """What plays the episodes of one step, by the weights as they are. See workers.py and remote.py for others."""
        engine = self._engine(self.config.problems * self.config.group)
        return lambda jobs: play(engine, jobs, self.config.max_turns)

    def _part(self, step: int) -> Batch:
        """Go on with what was carried, begin as many new groups as ever, and stop when enough of that is done."""
        c = self.config
        new = [Started(step, p, g) for p in range(c.problems) for g in range(c.group)]
        running = [s for s in self.carried if s.score is None] + new  # the oldest first: they must not starve
        groups = {s.group for s in running}

        def enough(done: list[bool]) -> bool:
            open_groups = {s.group for s, over in zip(running, done, strict=True) if not over}
            return sum(done) >= c.partial * len(running) and open_groups < groups  # some group is complete

        whole = [s for s in self.carried if s.score is not None]
        written = -sum(len(s.versions) for s in running)
        played = list(self._play(running, enough))
        ended = [(job, episode) for _, job, episode in played if episode.stop is not StopReason.CANCELLED]
        scores = iter(grade_all([job for job, _ in ended], [episode for _, episode in ended]))
        for s, job, episode in played:
            done = episode.stop is not StopReason.CANCELLED
            s = s.after(episode, step, next(scores) if done else None)
            written += len(s.versions)
            whole.append(s)
            if done:
                self._episodes[s.key] = job, episode
        whole.sort(key=lambda s: s.key)
        open_groups = {s.group for s in whole if s.score is None}
        self.carried = [s for s in whole if s.group in open_groups]
        for s in self.carried:
            if s.score is not None:
                job, episode = self._episodes[s.key]
                self._episodes[s.key] = job, as_recorded(episode)
        over = [s for s in whole if s.group not in open_groups]
        attempts = [
            Attempt(*self._episodes.pop(s.key), s.score, tuple(version < step for version in s.versions))
            for s in over if s.score is not None
        ]  # fmt: skip
        age = max((step - version for s in over for version in s.versions), default=0)
        return Batch(attempts, written, {"carried": len(self.carried), "stale/steps": age})

    def _play(
        self, these: Sequence[Started], enough: Callable[[list[bool]], bool] = all
    ) -> Iterator[tuple[Started, Job, Episode]]:
        c = self.config
        of_step = {step: self._jobs(step, 0, c.problems) for step in {s.step for s in these}}
        jobs = [of_step[s.step][s.problem * c.group + s.episode] for s in these]
        model = EngineModel(self._engine(len(these)), self.chat)
        episodes = [begin(Replay(model, s.turns), job, c.max_turns) for s, job in zip(these, jobs, strict=True)]
        return zip(these, jobs, model.run(episodes, enough), strict=True)

    # --- state --------------------------------------------------------------------------------------
    def dump(self, step: int) -> list[str]:
        """What step `step` depends on besides weights and its number."""
        return [s.dump() for s in self.carried]

    def load(self, step: int, records: Sequence[str]) -> None:
        self.carried = [Started.load(record) for record in records]
        whole = [s for s in self.carried if s.score is not None]
        self._episodes = {s.key: (job, episode) for s, job, episode in self._play(whole)} if whole else {}

    def close(self) -> None:
        """Nothing is open."""

    def _jobs(self, step: int, first: int, count: int) -> list[Job]:
        """The episodes of the problems `first` to `first` + `count` of a step, a group's one after the other."""
        c = self.config
        return [
            Job(task, problem, Sampling(
                temperature=c.temperature, top_p=c.top_p, top_k=c.top_k, min_p=c.min_p, keep_sets=True,
                max_tokens=c.max_tokens, thinking=c.thinking, answer_reserve=c.answer_reserve,
                halt_repeating=c.halt_repeating,
                seed=stable_hash(c.seed, step, first + p, g),
            ), rewards=rewards_of(self.rewards, task.name))
            for p, (task, problem) in enumerate(draw_problems(self.tasks, c.seed, step, count, first))
            for g in range(c.group)
        ]  # fmt: skip

    def _policy(self) -> Transformer:
        """What writes."""
        return self.model

    def _engine(self, episodes: int) -> Engine:
        """A new one: nothing is left of other weights."""
        c = self.config
        turns = c.max_turns > 1 and any(task.tools for task, _ in self.tasks)  # a turn goes on from the one before
        return Engine(
            sampling_model(self._policy(), c), self.chat, min(c.max_rows, episodes), c.length + 1, torch.device(self.device),
            record_experts=c.replay == "sampler", prefix_bytes=PREFIX_BYTES if turns else 0,
        )  # fmt: skip


def learning(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """What changes from step to step; routers' balancing biases don't in RL."""
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def graded(attempts: Sequence[Attempt], group: int) -> tuple[Tensor, Tensor]:
    """Of the groups, rewards [P,G], 0 where there is none, and whether there is one [P,G]."""
    ok = torch.tensor([a.score.ok for a in attempts]).view(-1, group)
    value = torch.tensor([a.score.value for a in attempts]).view(-1, group)
    return torch.where(ok, value, 0.0), ok


def spread(attempts: Sequence[Attempt], group: int) -> Tensor:
    """[P]: which groups teach something, whatever the objective makes of it."""
    return advantages(*graded(attempts, group), "mean")[1]
