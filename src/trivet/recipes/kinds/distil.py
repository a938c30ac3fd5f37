"""Distillation of a teacher's distribution into a student: see rl/distil.py. (Of its texts: a `train` stage on them.)"""

from __future__ import annotations

from typing import Any, Literal, Self

import torch
from pydantic import Field

from trivet.config import UserError
from trivet.hub.checkpoint import load_pair
from trivet.model.lora import LoRA
from trivet.recipes.adapted import save_result
from trivet.recipes.kinds.base import Context, StageBase, load_start, load_tasks
from trivet.rl.distil import DistilConfig, distil


class DistilStage(StageBase):
    """A student that learns what a teacher would write, token by token."""

    kind: Literal["distil"] = "distil"
    start: str = Field(description="stage or model directory of the student")
    teacher: str = Field(description="stage or model directory of the teacher; same tokenizer")
    lora: LoRA | None = Field(default=None, description="train adapters of `start`, not its weights")
    tasks: tuple[dict[str, Any], ...] = Field(min_length=1, description="tasks to draw questions from")
    distil: DistilConfig

    def inputs(self) -> set[str]:
        return {self.start, self.teacher}

    def reseeded(self, seed: int) -> Self:
        return self.model_copy(update={"distil": self.distil.model_copy(update={"seed": self.distil.seed + seed})})


def run(stage: DistilStage, context: Context) -> dict[str, Any]:
    start, student, chat = load_start(stage.start, stage.lora, stage.distil.seed, context)
    teacher, theirs = load_pair(context.find(stage.teacher), context.device, torch.float32)
    if chat.tokenizer.get_vocab() != theirs.tokenizer.get_vocab():
        raise UserError(
            f"{stage.start} and {stage.teacher} have different vocabularies: their tokens can't be compared."
        )
    tasks = load_tasks(stage.tasks, context)
    student.to(context.device)
    summary = distil(student, teacher, chat, tasks, stage.distil, context.out, progress=context.progress)
    save_result(student, chat, context.out, start)
    return summary
