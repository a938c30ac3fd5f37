"""What every part of a spec is: a value, checked when it is made."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Frozen(BaseModel):
    """A value object: immutable, and an unknown key is an error rather than a shrug."""

    model_config = ConfigDict(frozen=True, extra="forbid")
