"""A tool is a typed Python function: its signature becomes the JSON schema that the model is told.

Running a tool never raises because of what a model wrote: bad arguments and failures come back as
text for the model to read, with a status for whoever counts.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError, create_model

from trivet.messages import ToolSpec

Status = Literal["ok", "error", "timeout", "limit"]


@dataclass(frozen=True)
class ToolResult:
    text: str
    status: Status = "ok"


class ToolFailure(Exception):
    """Raised by a tool's function to tell the model what went wrong."""

    def __init__(self, text: str, status: Status = "error") -> None:
        super().__init__(text)
        self.status: Status = status


class Tool:
    """Name, description and parameters come from the function; `run` checks arguments against them."""

    def __init__(self, function: Callable[..., str]) -> None:
        parameters = inspect.signature(function, eval_str=True).parameters
        fields: dict[str, Any] = {
            name: (p.annotation, ... if p.default is p.empty else p.default) for name, p in parameters.items()
        }
        self._function = function
        self._arguments = create_model(f"{function.__name__}_arguments", **fields, __config__={"extra": "forbid"})
        schema = TypeAdapter(self._arguments).json_schema()
        self.spec = ToolSpec(function.__name__, inspect.getdoc(function) or "", schema)
        self.first = next(iter(parameters))  # what a call in bare syntax fills

    @property
    def name(self) -> str:
        return self.spec.name

    def run(self, arguments: Mapping[str, Any]) -> ToolResult:
        try:
            checked = self._arguments.model_validate(dict(arguments))
        except ValidationError as e:
            first = e.errors()[0]
            return ToolResult(f"bad arguments: {'.'.join(map(str, first['loc']))}: {first['msg']}", "error")
        try:
            return ToolResult(self._function(**dict(checked)))
        except ToolFailure as e:
            return ToolResult(str(e), e.status)
