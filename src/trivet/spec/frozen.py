"""What every part of a spec is: a value, checked when it is made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict

T = TypeVar("T")
FREE = "may change between two sittings of a run"
# Who computes and where, what is shown, when it is saved: no result depends on it, but for rounding.
Free = Annotated[T, FREE]


class Frozen(BaseModel):
    """A value object: immutable, and an unknown key is an error rather than a shrug."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def identity(self) -> dict[str, Any]:
        """The settings that are not `Free`, as JSON values: what a run must have been started with to go on."""
        return self.without_free(self.model_dump(mode="json"))

    @classmethod
    def without_free(cls, settings: Mapping[str, Any]) -> dict[str, Any]:
        """The same of settings that were written down, perhaps by an older version."""
        kept = {}
        for name, value in settings.items():
            field = cls.model_fields.get(name)
            of: Any = field.annotation if field is not None else None
            if field is None or FREE not in field.metadata:
                inner = isinstance(of, type) and issubclass(of, Frozen)
                kept[name] = of.without_free(value) if inner else value
        return kept
