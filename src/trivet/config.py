"""Runs as TOML, read strictly: one clear sentence for whatever is wrong, nothing ignored.

`load(path, Schema, overrides)` reads a TOML file, applies `section.key=value` overrides and
validates with pydantic. Every failure is a `UserError`, whose text is meant to be printed as is.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

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
    errors = error.errors()
    first = next((e for e in errors if e["type"] == "extra_forbidden"), errors[0])  # a mistyped key is missing, too
    path, known = _walk(schema, [str(p) for p in first["loc"]])
    name = ".".join(path) or "the file"
    if first["type"] == "extra_forbidden":
        return f"unknown key {name!r}.{nearest(path[-1], known)}"
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


def _walk(schema: type[BaseModel], path: Sequence[str]) -> tuple[list[str], list[str]]:
    """A validation error's path as a person wrote it, and the keys that are valid where it ends.

    pydantic puts the tag or type of a union's member into the path; the file has no such level.
    """
    shown: list[str] = []
    keys: list[str] = []
    at: Any = schema
    for part in path:
        options = _options(at)
        if len(options) > 1:  # a union: this part says which member
            at = next((option for option in options if part in _tags(option)), None)
            continue
        at = options[0] if options else None
        shown.append(part)
        if _is_model(at):
            keys = sorted(at.model_fields)
            at = at.model_fields[part].annotation if part in at.model_fields else None
        else:  # a table's own key, or a place in a list
            arguments = [a for a in get_args(at) if a is not ...]
            at = arguments[-1] if arguments else None
    return shown, keys


def _options(annotation: Any) -> list[Any]:
    """The members of a union, None left out; anything else is its own only member."""
    if get_origin(annotation) is Annotated:
        return _options(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [option for part in get_args(annotation) if part is not NoneType for option in _options(part)]
    return [] if annotation is None else [annotation]


def _tags(option: Any) -> list[Any]:
    """The literal values by which a member of a discriminated union is told apart."""
    if not _is_model(option):
        return []
    return [
        tag
        for f in option.model_fields.values()
        if get_origin(f.annotation) is Literal
        for tag in get_args(f.annotation)
    ]


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)
