"""What every run of steps is told. No torch, so that a planner may read it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from trivet.spec import Free, Frozen

Where = Literal["none", "optimizer", "gradients"]  # what is kept in host memory, see offload.py


class RunConfig(Frozen):
    """What `[train]`, `[rl]` and the tables of other stages have in common."""

    steps: int = Field(gt=0, description="optimizer steps of the whole run")
    seed: int = Field(default=0, description="torch is seeded with (seed, step) at every step")
    save_every_seconds: Free[float] = Field(default=60.0, ge=0, description="time between saved states")
    tensorboard: Free[bool] = Field(default=True, description="write TensorBoard event files too")
