"""A model priced on paper, from its spec alone: no weights read, no torch imported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trivet.config import UserError, read_toml, validate
from trivet.spec import ModelSpec


def plan_models(paths: list[Path], context: int, as_json: bool) -> None:
    """Print a table (or JSON) with one column a model."""
    rows = [price(path.name or str(path), find_spec(path), context) for path in paths]
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("", *(row["name"] for row in rows), box=None)
    for key, label in LABELS.items():
        table.add_row(label.format(context=f"{context:,}"), *(f"{row[key]:,}" for row in rows))
    Console().print(table)


LABELS = {
    "total_params": "parameters",
    "active_params": "active a token",
    "weight_bytes": "weights, bf16 bytes",
    "cache_bytes_per_token": "cache a token, bf16 bytes",
    "state_bytes": "recurrent state, fp32 bytes",
    "cache_bytes": "cache and state at {context} tokens, bytes",
    "flops_per_token": "FLOPs a token at {context}",
    "training_flops_per_token": "training FLOPs a token, rows of {context}",
}


def price(name: str, spec: ModelSpec, context: int) -> dict[str, Any]:
    """What one model costs. Bytes are of bf16 weights and caches and fp32 recurrent states."""
    return {
        "name": name,
        "context": context,
        "total_params": spec.num_params(),
        "active_params": spec.active_params(),
        "weight_bytes": 2 * spec.num_params(),
        "cache_bytes_per_token": spec.cache_bytes_per_token(2),
        "state_bytes": spec.state_bytes(4),
        "cache_bytes": spec.cache_bytes_per_token(2) * context + spec.state_bytes(4),
        "flops_per_token": spec.flops_per_token(context),
        "training_flops_per_token": spec.training_flops_per_token(context),
    }


def find_spec(path: Path) -> ModelSpec:
    """The spec in a model directory, or in the `[model]` (or first stage with one) of a TOML file.

    A run file leaves vocab_size to its tokenizer.
    """
    config = path / "config.json"
    if config.is_file():
        return validate(json.loads(config.read_text()).get("spec", {}), ModelSpec, str(config))
    if path.is_dir():
        raise UserError(f"{str(path)!r} is no model directory: it has no config.json.")
    data = read_toml(path)
    tables = [data, *data.get("stages", {}).values()]
    for table in tables:
        if "model" in table:
            return validate({"vocab_size": _vocab(table), **table["model"]}, ModelSpec, f"{path} [model]")
    raise UserError(f"{path} describes no model: it has no [model] table.")


def _vocab(table: dict[str, Any]) -> int:
    """How many tokens a run's tokenizer will have; "bpe:SIZE" is taken at its word."""
    from trivet.chat import Chat, tiny_chat

    kind, _, size = str(table.get("tokenizer", "tiny")).partition(":")
    if kind == "bpe" and size.isdigit():
        return int(size)
    return tiny_chat().vocab_size if kind == "tiny" else Chat.load(Path(table["tokenizer"])).vocab_size
