"""Curricula in a run of RL: what each step's groups scored moves their task's standing, which is part of the state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trivet.rl.rollout import Attempt
from trivet.tasks import Climber, Task
from trivet.tasks.curriculum import Standing

Tasks = Sequence[tuple[Task, float]]


def climb(tasks: Tasks, attempts: Sequence[Attempt]) -> dict[str, float]:
    """Hand each climbing task the accuracy of its groups, in order; the levels that were drawn, as metrics."""
    climbers = [task for task, _ in tasks if isinstance(task, Climber)]
    levels = {f"level/{task.name}": float(task.standing.level) for task in climbers}
    for task in climbers:
        groups: dict[str, list[Attempt]] = {}
        for attempt in attempts:
            if attempt.job.task is task and attempt.score.ok:
                groups.setdefault(attempt.job.problem.id, []).append(attempt)
        task.adapt([(g[0].job.problem.level, sum(a.right for a in g) / len(g)) for g in groups.values()])
    return levels


def standings(tasks: Tasks) -> dict[str, Any]:
    """Where climbing tasks stand, for a saved state, by their place."""
    return {
        str(i): {"level": task.standing.level, "recent": list(task.standing.recent)}
        for i, (task, _) in enumerate(tasks)
        if isinstance(task, Climber)
    }


def set_standings(tasks: Tasks, saved: Mapping[str, Any]) -> None:
    for i, (task, _) in enumerate(tasks):
        if isinstance(task, Climber) and str(i) in saved:
            task.standing = Standing(saved[str(i)]["level"], tuple(saved[str(i)]["recent"]))
