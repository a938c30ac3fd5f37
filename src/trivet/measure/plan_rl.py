"""The stages of RL in a TOML file, each with the model that it starts from, priced in memory. No torch.

A stage starts from a directory, or from another stage of the same file: that one is followed to where a [model] stands.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from trivet.config import UserError, read_toml, validate
from trivet.measure.memory_rl import rl_memory, rows_of
from trivet.rl.config import RLConfig
from trivet.spec import ModelSpec

Table = dict[str, Any]


class Planned(NamedTuple):
    """A stage of RL. label: what a person calls it; adapters: it trains nothing else, which is not priced."""

    label: str
    start: str | Table  # a model's name, or the table that holds its [model]
    config: RLConfig
    adapters: bool


def rl_stages(path: Path) -> list[Planned]:
    """In the order of the file. Raises UserError where `[rl]` is wrong or leads to no model."""
    data = read_toml(path)
    stages: dict[str, Table] = data.get("stages") or {"": data}
    return [
        Planned(
            name or path.stem, origin(path, stages, name),
            validate(table["rl"], RLConfig, f"{path} [{f'stages.{name}.rl' if name else 'rl'}]"), table.get("lora") is not None,
        )
        for name, table in stages.items() if isinstance(table.get("rl"), dict)
    ]  # fmt: skip


def origin(path: Path, stages: dict[str, Table], name: str) -> str | Table:
    """Where the model of a stage is described."""
    seen: list[str] = []
    while name in stages:
        table = stages[name]
        if "model" in table and table.get("kind") != "distil":
            return table
        if name in seen or not isinstance(table.get("start"), str):
            raise UserError(f"{path}: no [model] is found from the `start` of stage {seen[0] if seen else name!r} on.")
        seen.append(name)
        name = table["start"]
    return name


def price_rl(spec: ModelSpec, c: RLConfig) -> dict[str, Any]:
    """Bytes on the learner's device, with the settings that they follow from."""
    said = {"at_once": rows_of(c), "slots": c.length + 1, "rows": c.rows, "length": c.length}
    return said | {"precision": c.precision, "recompute": c.recompute, "offload": c.offload} | rl_memory(spec, c).row()
