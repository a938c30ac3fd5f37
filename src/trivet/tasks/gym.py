"""The procedural tasks of reasoning-gym, by name: `gym:leg_counting` (pip install 'trivet[tasks]').

`levels` are those of the dataset's own curriculum: level k sets each of its attributes to the k-th step or its last
one. Scorers are not ours, and some evaluate what the model wrote: they run apart, where they may hang.
"""

from __future__ import annotations

import json
import random
from functools import lru_cache
from typing import Any, Literal

from pydantic import Field

from trivet.config import UserError, nearest
from trivet.messages import Message, Score
from trivet.spec import Frozen
from trivet.tasks.apart import grade_apart
from trivet.tasks.base import Demo, Problem, Split, is_test

SIZE = 100_000  # problems that a seed of a dataset offers; they are made when asked for
SECONDS = 5.0  # for a score; the first one makes the dataset


class GymConfig(Frozen):
    name: Literal["gym"] = "gym"
    dataset: str = Field(description="a reasoning-gym dataset, e.g. leg_counting")
    settings: dict[str, Any] = Field(default_factory=dict, description="passed to the dataset")
    levels: int = Field(default=1, ge=1, description="levels of its curriculum to draw from; 1: `settings` as they are")
    seed: int = 0


class Gym:
    tools: tuple[str, ...] = ()

    def __init__(self, config: GymConfig) -> None:
        self.config, self.name = config, f"gym:{config.dataset}"
        self.levels = tuple(range(config.levels))
        self.key = (config.dataset, json.dumps(config.settings), config.seed)
        for level in {0, config.levels - 1}:
            self.data(level)  # what does not fit is said now

    def data(self, level: int) -> Any:
        return dataset(*self.key, level if self.config.levels > 1 else None)

    def problem(self, split: Split, index: int, level: int | None = None) -> Problem:
        """Walk from a hashed place until a problem of the split turns up."""
        level = self.levels[index % len(self.levels)] if level is None else level
        data, start = self.data(level), random.Random(f"{split} {index}").randrange(SIZE)
        for place in (p % SIZE for p in range(start, start + 1000)):
            entry = data[place]
            if is_test(entry["question"]) == (split == "test"):
                id, meta = f"{self.name}-{split}-{index}", {"place": place}
                return Problem(id, entry["question"], str(entry["answer"]), level, meta)
        raise UserError(f"{self.name} has too few different problems for a {split} split.")

    def demonstrate(self, problem: Problem, rng: random.Random) -> Demo:
        return Demo((*problem.messages, Message("assistant", problem.answer)), thinking=False)

    def grade(self, problem: Problem, message: Message) -> Score:
        level = problem.level if self.config.levels > 1 else None
        place, answer = problem.meta["place"], message.content.strip()
        return grade_apart("trivet.tasks.gym:score", *self.key, level, place, answer, seconds=SECONDS)


def score(name: str, settings: str, seed: int, level: int | None, place: int, answer: str) -> Score:
    """The dataset's own score of an answer to its problem number `place`; called in a worker."""
    data = dataset(name, settings, seed, level)
    return Score(float(data.score_answer(answer, _entry(name, settings, seed, level, place))))


WARM_UP = {"score": ("leg_counting", "{}", 0, None, 0, "4")}


@lru_cache(maxsize=64)
def _entry(name: str, settings: str, seed: int, level: int | None, place: int) -> Any:
    return dataset(name, settings, seed, level)[place]


@lru_cache(maxsize=64)
def dataset(name: str, settings: str, seed: int, level: int | None) -> Any:
    """A dataset, at a level of its curriculum or as `settings` (JSON) say. Raises UserError where it can't be."""
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS, create_curriculum, has_curriculum
    except ImportError:
        raise UserError("Tasks named gym:... need reasoning-gym: pip install 'trivet[tasks]'") from None
    if name not in DATASETS:
        raise UserError(f"reasoning-gym has no {name!r}.{nearest(name, DATASETS)}")
    given = json.loads(settings)
    try:
        if level is not None:
            if not has_curriculum(name):
                raise UserError(f"gym:{name} has no curriculum: leave out `levels`.")
            curriculum = create_curriculum(name)
            most = max(len(attribute.levels) for attribute in curriculum.attributes.values())
            if level >= most:
                raise UserError(f"gym:{name} has {most} levels, not {level + 1}.")
            for attribute, steps in curriculum.attributes.items():
                curriculum.set_attr_level(attribute, min(level, len(steps.levels) - 1))
            given = vars(curriculum.generate_configuration(given))
        return reasoning_gym.create_dataset(name, **{**given, "seed": seed, "size": SIZE})
    except (TypeError, AssertionError, ValueError) as e:
        raise UserError(f"gym:{name}: settings {settings} were refused: {e}") from None
