"""Stages that learn from rewards."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field

from trivet.model.lora import LoRA
from trivet.recipes.adapted import save_result
from trivet.recipes.judging import known_rewards
from trivet.recipes.kinds.base import Context, StageBase, load_start, load_tasks
from trivet.rl.config import RLConfig
from trivet.rl.learner import learn
from trivet.rl.rewards import make_rewards
from trivet.train.parallel import first


class RLStage(StageBase):
    """Reinforcement learning with verifiable rewards, from a trained model."""

    kind: Literal["rl"] = "rl"
    start: str = Field(description="stage or model directory to start from")
    lora: LoRA | None = Field(default=None, description="train adapters of `start`, not its weights")
    tasks: tuple[dict[str, Any], ...] = Field(min_length=1, description="tasks to learn: name, weight, settings")
    rewards: tuple[dict[str, Any], ...] = Field(
        default=(), description="terms added to a task's grade: name, weight, label, tasks, instead, settings"
    )
    rl: RLConfig

    def inputs(self) -> set[str]:
        models = {table["model"] for table in self.rewards if isinstance(table.get("model"), str)}
        return {self.start, *models}

    def reseeded(self, seed: int) -> Self:
        return self.model_copy(update={"rl": self.rl.model_copy(update={"seed": self.rl.seed + seed})})


def run(stage: RLStage, context: Context) -> dict[str, Any]:
    start, model, chat = load_start(stage.start, stage.lora, stage.rl.seed, context)
    tasks = load_tasks(stage.tasks, context)
    rewards = make_rewards(stage.rewards, known_rewards(context.find, context.device))
    summary = learn(
        model, chat, tasks, stage.rl, context.out, rewards=rewards, progress=context.progress, device=context.device
    )
    if first():
        save_result(model, chat, context.out, start)
    return summary
