"""Episodes by the hundred: problems, an engine and the agent loop become graded attempts.

Training and evaluation share this: an attempt is one `agent.loop` episode with its task's `grade`,
nothing in between. All attempts talk to one engine at once; those of a group come one after the
other, so that the engine computes their prompt once.

A score that is not ok (grader failed, generation failed) is no reward: it is counted, never a 0.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from trivet.agent.loop import Episode, Row, ToolStep, row, run_episode
from trivet.config import UserError
from trivet.engine import Engine, EngineModel
from trivet.messages import ChatModel, Sampling, Score, StopReason
from trivet.rl.rewards import Case, Reward, add_rewards, rewards_of
from trivet.tasks import Problem, Task, graded_apart, tools_for
from trivet.tasks.apart import WORKERS
from trivet.tools import Tool, get_tool
from trivet.train.data import stable_hash


@dataclass(frozen=True)
class Job:
    """One attempt to be made. `tools`: whether the task's tools may be called."""

    task: Task
    problem: Problem
    sampling: Sampling
    tools: bool = True
    rewards: tuple[Reward, ...] = ()  # beside the task's grade


@dataclass(frozen=True)
class Attempt:
    """A job done: what happened, and what it is worth. stale: see Row, of the tokens of all its completions."""

    job: Job
    episode: Episode
    score: Score
    stale: tuple[bool, ...] = ()

    @property
    def row(self) -> Row:
        """The ids that the model saw and wrote; raises UserError where no single row is what happened."""
        try:
            found = row(self.episode)
        except ValueError as e:
            raise UserError(
                f"An episode of {self.job.task.name!r} can't be trained on: {e}. The chat template changes "
                "earlier turns when it renders later ones; use one that only appends."
            ) from None
        if not any(self.stale):
            return found
        stale, left = [False] * len(found.ids), list(self.stale)
        for completion in self.episode.completions:
            start, count = len(completion.prompt_tokens), len(completion.tokens)
            stale[start : start + count], left = left[:count], left[count:]
        return replace(found, stale=tuple(stale))

    @property
    def tokens(self) -> int:
        """Tokens of all completions, thinking and forced ones included."""
        return sum(len(c.tokens) for c in self.episode.completions)

    @property
    def right(self) -> bool:
        """By the task's own grade, whatever reward terms add to it."""
        return self.score.ok and self.score.parts.get("task", self.score.value) >= 1

    @property
    def thinks(self) -> bool:
        return self.episode.reasoning_tokens > 0

    @property
    def calls_tool(self) -> bool:
        return any(isinstance(step, ToolStep) for step in self.episode.steps)

    @property
    def truncated(self) -> bool:
        """It ran out of tokens or turns or was halted, so it never came to an answer of its own."""
        return self.repeats or self.episode.stop in (StopReason.LENGTH, "max_turns")

    @property
    def repeats(self) -> bool:
        """It was halted because it only repeated itself."""
        return self.episode.stop is StopReason.REPETITION


def play(engine: Engine, jobs: Sequence[Job], max_turns: int) -> list[Attempt]:
    """Run all jobs, in order, over one engine. Deterministic: each job brings its own seed."""
    model = EngineModel(engine, engine.chat)
    built_in = cache(get_tool)
    episodes = model.run([begin(model, job, max_turns, built_in) for job in jobs])
    return [Attempt(*done) for done in zip(jobs, episodes, grade_all(jobs, episodes), strict=True)]


def grade_all(jobs: Sequence[Job], episodes: Sequence[Episode]) -> list[Score]:
    """Scores of episodes, in their order: their tasks' grades and the terms beside them."""
    return add_all(jobs, episodes, grades(jobs, episodes))


def grades(jobs: Sequence[Job], episodes: Sequence[Episode]) -> list[Score]:
    """The tasks' own scores; graders in processes work side by side, as many as there are, others one by one here."""
    pairs = list(zip(jobs, episodes, strict=True))
    threads = ThreadPoolExecutor(WORKERS)  # none runs before there is work for it
    try:
        apart = {i: threads.submit(grade, *pair) for i, pair in enumerate(pairs) if graded_apart(pair[0].task)}
        return [apart[i].result() if i in apart else grade(*pair) for i, pair in enumerate(pairs)]
    finally:
        threads.shutdown(cancel_futures=True)


def add_all(jobs: Sequence[Job], episodes: Sequence[Episode], scores: list[Score]) -> list[Score]:
    """Scores of the tasks with every job's reward terms added; those of equal terms together, as a judge wants them."""
    for rewards in dict.fromkeys(job.rewards for job in jobs if job.rewards):
        places = [i for i, job in enumerate(jobs) if job.rewards == rewards]
        cases = [Case(jobs[i].problem, episodes[i]) for i in places]
        for i, score in zip(places, add_rewards(cases, [scores[i] for i in places], rewards), strict=True):
            scores[i] = score
    return scores


def begin(
    model: ChatModel, job: Job, max_turns: int, built_in: Callable[[str], Tool] = get_tool
) -> Coroutine[Any, Any, Episode]:
    """The episode of a job, to be run."""
    world = job.problem.world
    tools = tools_for(job.task, job.problem, built_in) if job.tools and world is None else []
    return run_episode(model, job.problem.messages, tools, job.sampling, max_turns, world)


def rewarded(attempts: Sequence[Attempt], rewards: Sequence[Reward]) -> list[Attempt]:
    """Attempts that their tasks have graded, with the terms added."""
    jobs = [replace(a.job, rewards=rewards_of(rewards, a.job.task.name)) for a in attempts]
    scores = add_all(jobs, [a.episode for a in attempts], [a.score for a in attempts])
    return [replace(a, job=job, score=score) for a, job, score in zip(attempts, jobs, scores, strict=True)]


def grade(job: Job, episode: Episode) -> Score:
    """The task's own score, or a status that says why there is none. A grader never stops a run."""
    for completion in episode.completions:
        if completion.stop in (StopReason.ERROR, StopReason.CANCELLED):
            return Score(0.0, "error", detail=f"generation: {completion.error or completion.stop}")
    if episode.failure is not None:
        return episode.failure
    try:
        if job.problem.world is not None:
            return job.problem.world.grade(episode.messages)
        return job.task.grade(job.problem, episode.final)
    except Exception as e:  # whatever a user's grader raises is counted, and stops the run if it is frequent
        return Score(0.0, "error", detail=f"grader of {job.task.name!r}: {type(e).__name__}: {e}")


def draw_problems(
    tasks: Sequence[tuple[Task, float]], seed: int, step: int, count: int, first: int = 0
) -> list[tuple[Task, Problem]]:
    """The training problems `first` to `first` + `count` of a step: a pure function of (seed, step, first, count).

    Tasks are drawn systematically (one random offset, then even spacing), so that their shares hold
    in every batch and not only on average; problems by hash.
    """
    weights = [weight for _, weight in tasks]
    total = sum(weights)
    if not tasks or min(weights) < 0 or total <= 0:
        raise UserError(f"RL needs tasks with weights >= 0, not all 0; got {weights}.")
    bounds = [sum(weights[: i + 1]) / total for i in range(len(tasks))]
    offset = stable_hash(seed, step, *([-first] if first else [])) / 2**64
    drawn = []
    for i in range(count):
        point = (i + offset) / count
        task = next((task for (task, w), bound in zip(tasks, bounds, strict=True) if w and point < bound), tasks[-1][0])
        drawn.append((task, task.problem("train", stable_hash(seed, step, first + i))))
    return drawn
