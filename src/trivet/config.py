"""Runs as TOML, read strictly: one clear sentence for whatever is wrong, nothing ignored.

`load(path, Schema, overrides)` reads a TOML file, applies `section.key=value` overrides and
validates with pydantic. Every failure is a `UserError`, whose text is meant to be printed as is.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError


class UserError(Exception):
    """Something the user can mend. Its text says what was wrong, where, and what to do."""


M = TypeVar("M", bound=BaseModel)


def nearest(word: str, known: Iterable[str]) -> str:
    """` Did you mean 'x'?` for the closest known word, or an empty string."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.4)
    return f" Did you mean {near[0]!r}?" if near else ""


def load(path: Path, schema: type[M], overrides: Sequence[str] = ()) -> M:
    """Read and validate a TOML file. Raises UserError naming file, key and nearest valid key."""
    return validate(read_toml(path), schema, str(path), overrides)


def read_toml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        siblings = [p.name for p in path.parent.glob("*.toml")] if path.parent.is_dir() else []
        raise UserError(f"No file {str(path)!r}.{nearest(path.name, siblings)}")
    try:
        return tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise UserError(f"{path} is not valid TOML: {e}.") from None


def validate(data: dict[str, Any], schema: type[M], where: str, overrides: Sequence[str] = ()) -> M:
    for override in overrides:
        _apply(data, override)
    try:
        return schema.model_validate(data)
    except ValidationError as e:
        raise UserError(f"{where}: {explain(e, schema)}") from None


def _apply(data: dict[str, Any], override: str) -> None:
    key, eq, text = override.partition("=")
    if not eq or not key:
        raise UserError(f"Override {override!r} should read key=value, for example rl.steps=20.")
    try:
        value = tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        value = text  # a bare word is a string
    *parents, last = key.split(".")
    at = data
    for part in parents:
        at = at.setdefault(part, {})
        if not isinstance(at, dict):
            raise UserError(f"Override {override!r}: {part!r} is a value, not a section.")
    at[last] = value


def explain(error: ValidationError, schema: type[BaseModel]) -> str:
    """The first problem of a ValidationError as one sentence a person can act on."""
    first = error.errors()[0]
    path = [str(p) for p in first["loc"]]
    name = ".".join(path) or "the file"
    if first["type"] == "extra_forbidden":
        return f"unknown key {name!r}.{nearest(path[-1], _keys_at(schema, path[:-1]))}"
    if first["type"] == "missing":
        return f"{name!r} is missing."
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        return f"{name}: {message}." if not message.endswith("?") else f"{name}: {message}"
    given = first.get("input")
    shown = f", not {given!r}" if isinstance(given, str | int | float | bool) else ""
    hint = ""
    if isinstance(given, str) and "expected" in first.get("ctx", {}):
        hint = nearest(given, str(first["ctx"]["expected"]).replace("'", "").replace(" or ", ", ").split(", "))
    return f"{name!r}: {message[0].lower()}{message[1:]}{shown}.{hint}"


def _keys_at(schema: type[BaseModel], path: Sequence[str]) -> list[str]:
    """The keys that are valid at `path`, looking through tables, lists, unions and their tags."""
    models: list[type[BaseModel]] = [schema]
    for part in path:
        inner: list[type[BaseModel]] = []
        for model in models:
            if part in model.model_fields:
                inner += _models_in(model.model_fields[part].annotation)
        models = inner or models  # a table's own key, a list index or a union tag: stay
    return sorted({key for model in models for key in model.model_fields})


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    found: list[type[BaseModel]] = []
    for arg in getattr(annotation, "__args__", ()):
        found += _models_in(arg)
    return found
