"""Problems, worked examples and graders, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from trivet.config import UserError, nearest, validate
from trivet.spec import Frozen
from trivet.tasks.arithmetic import Arithmetic, ArithmeticConfig
from trivet.tasks.arrange import Arrange, ArrangeConfig
from trivet.tasks.base import Demo, Problem, Split, Task, tools_for
from trivet.tasks.chain import Chain, ChainConfig
from trivet.tasks.code import Code, CodeConfig
from trivet.tasks.conversations import Conversations, ConversationsConfig
from trivet.tasks.curriculum import Climber, Curriculum
from trivet.tasks.gym import Gym, GymConfig
from trivet.tasks.hunt import Hunt, HuntConfig
from trivet.tasks.jsonl import Dataset, DatasetConfig, Jsonl, JsonlConfig
from trivet.tasks.search import Search, SearchConfig
from trivet.tasks.verifiers import Verifiers, VerifiersConfig

TASKS: dict[str, tuple[type[Frozen], Callable[[Any], Task]]] = {
    "chain": (ChainConfig, Chain),
    "search": (SearchConfig, Search),
    "arithmetic": (ArithmeticConfig, Arithmetic),
    "arrange": (ArrangeConfig, Arrange),
    "hunt": (HuntConfig, Hunt),
    "jsonl": (JsonlConfig, Jsonl),
    "dataset": (DatasetConfig, Dataset),
    "conversations": (ConversationsConfig, Conversations),
    "code": (CodeConfig, Code),
    "gym": (GymConfig, Gym),
    "verifiers": (VerifiersConfig, Verifiers),
}
SHORT = {"gym": "dataset", "verifiers": "env"}  # gym:NAME is short for name = "gym", dataset = "NAME"


def make_task(settings: Mapping[str, Any]) -> Task:
    """A task from its table in a config: `name` and its own settings; `gym:NAME` and `verifiers:NAME` are short.

    `curriculum` = true, or a table of `Curriculum`, makes it climb its levels in RL.

    Raises UserError naming the nearest known task or setting.
    """
    settings = dict(settings)
    name = str(settings.get("name", ""))
    kind, colon, rest = name.partition(":")
    if colon and kind in SHORT:
        settings |= {"name": kind, SHORT[kind]: rest}
        name = kind
    if name not in TASKS:
        raise UserError(
            f"No task {name!r}; there are {', '.join(TASKS)}, gym:DATASET and verifiers:ENV.{nearest(name, TASKS)}"
        )
    curriculum = settings.pop("curriculum", False)
    schema, build = TASKS[name]
    task = build(validate(settings, schema, f"task {name!r}"))
    if curriculum is False:
        return task
    rule = {} if curriculum is True else curriculum
    if not isinstance(rule, dict):
        raise UserError(f"task {name!r}: curriculum must be true, false or a table, not {rule!r}.")
    return Climber(task, validate(dict(rule), Curriculum, f"curriculum of task {name!r}"))


def graded_apart(task: Task) -> bool:
    """Whether its grade only waits for a worker process (`apart`), so that several may be asked at once from threads."""
    inner = task.task if isinstance(task, Climber) else task
    return isinstance(inner, Gym | Verifiers) or (isinstance(inner, Jsonl) and inner.config.format == "math")


__all__ = ["TASKS", "Climber", "Demo", "Problem", "Split", "Task", "graded_apart", "make_task", "tools_for"]
