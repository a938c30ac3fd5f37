"""The procedural tasks of reasoning-gym, by name: `gym:leg_counting` (pip install 'trivet[tasks]')."""

from __future__ import annotations

import random
from typing import Any, Literal

from pydantic import Field

from trivet.config import UserError, nearest
from trivet.messages import Message, Score
from trivet.spec import Frozen
from trivet.tasks.base import Demo, Problem, Split, is_test

SIZE = 100_000  # problems that a seed of a dataset offers; they are made when asked for


class GymConfig(Frozen):
    name: Literal["gym"] = "gym"
    dataset: str = Field(description="a reasoning-gym dataset, e.g. leg_counting")
    settings: dict[str, Any] = Field(default_factory=dict, description="passed to the dataset")
    seed: int = 0


class Gym:
    tools: tuple[str, ...] = ()
    levels: tuple[int, ...] = (0,)

    def __init__(self, config: GymConfig) -> None:
        try:
            import reasoning_gym
            from reasoning_gym.factory import DATASETS
        except ImportError:
            raise UserError("Tasks named gym:... need reasoning-gym: pip install 'trivet[tasks]'") from None
        if config.dataset not in DATASETS:
            raise UserError(f"reasoning-gym has no {config.dataset!r}.{nearest(config.dataset, DATASETS)}")
        self.config, self.name = config, f"gym:{config.dataset}"
        try:
            self.data = reasoning_gym.create_dataset(config.dataset, seed=config.seed, size=SIZE, **config.settings)
        except (TypeError, AssertionError, ValueError) as e:
            raise UserError(f"{self.name}: settings {config.settings} were refused: {e}") from None

    def problem(self, split: Split, index: int, level: int | None = None) -> Problem:
        """Walk from a hashed place until a problem of the split turns up."""
        start = random.Random(f"{split} {index}").randrange(SIZE)
        for step in range(1000):
            entry = self.data[(start + step) % SIZE]
            if is_test(entry["question"]) == (split == "test"):
                return Problem(
                    f"{self.name}-{split}-{index}", entry["question"], str(entry["answer"]), 0, {"entry": entry}
                )
        raise UserError(f"{self.name} has too few different problems for a {split} split.")

    def demonstrate(self, problem: Problem, rng: random.Random) -> Demo:
        return Demo((*problem.messages, Message("assistant", problem.answer)), thinking=False)

    def grade(self, problem: Problem, message: Message) -> Score:
        try:
            return Score(float(self.data.score_answer(message.content.strip(), problem.meta["entry"])))
        except Exception as e:  # the scorer is not ours; whatever it raises must not become a 0
            return Score(0.0, "error", detail=f"{type(e).__name__}: {e}")
