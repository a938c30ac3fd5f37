"""What every kind of stage has, and what it may look at besides its own settings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from pydantic import Field

from trivet.chat import Chat
from trivet.config import UserError, nearest
from trivet.hub.checkpoint import load_pair
from trivet.model import Transformer
from trivet.model.lora import LoRA
from trivet.recipes.adapted import prepare
from trivet.spec import Frozen
from trivet.tasks import Task, make_task
from trivet.train.parallel import host

if TYPE_CHECKING:
    from trivet.recipes.stages import Recipe

Progress = Callable[[dict[str, Any]], None]
DATA = "data.jsonl"  # what a stage that makes data writes


class StageBase(Frozen):
    """A stage reads directories and writes one. Which ones it waits for is `inputs`."""

    threads: int = Field(default=0, ge=0, description="CPU threads; 0: the recipe's. Fewer let stages run side by side")

    def inputs(self) -> set[str]:
        """Names of the stages (or directories) that it reads from."""
        raise NotImplementedError

    def reseeded(self, seed: int) -> Self:
        """The stage under another seed. Evaluation stays on the same problems, so that seeds compare."""
        return self


@dataclass(frozen=True)
class Context:
    """What a stage may look at besides its own settings."""

    out: Path  # the stage's own directory
    run: Path  # the recipe's directory, parent of all stages
    recipe: Recipe | None
    device: torch.device
    progress: Progress | None
    say: Callable[[str], None]

    def find(self, name: str) -> Path:
        """An earlier stage of the same recipe by name, or any directory by path."""
        stages = list(self.recipe.stages) if self.recipe else []
        path = self.run / name if name in stages else Path(name)
        if not path.is_dir():
            raise UserError(f"{name!r} is neither a stage nor a directory.{nearest(name, stages)}")
        return path

    def data(self, name: str) -> Path:
        """The data of an earlier stage by its name, or any file by path."""
        stages = list(self.recipe.stages) if self.recipe else []
        return self.run / name / DATA if name in stages else Path(name)


def load_start(start: str, lora: LoRA | None, seed: int, context: Context) -> tuple[Path | None, Transformer, Chat]:
    """The model to go on from, ready to learn."""
    path = context.find(start)
    model, chat = load_pair(path, host(context.device), torch.float32)  # learning needs exact weights
    prepare(model, lora, path, seed, context.say)
    return path, model, chat


def load_tasks(configs: tuple[dict[str, Any], ...], context: Context) -> list[tuple[Task, float]]:
    """(task, weight) of each table; every key but `weight` belongs to the task. A `path` may name a stage with data."""
    tasks = []
    for config in configs:
        settings = dict(config)
        weight = settings.pop("weight", 1.0)
        if not isinstance(weight, int | float) or weight < 0:
            raise UserError(f"task {config.get('name')!r}: weight must be a number >= 0, not {weight!r}.")
        if isinstance(settings.get("path"), str):
            settings["path"] = str(context.data(settings["path"]))
        tasks.append((make_task(settings), float(weight)))
    return tasks
