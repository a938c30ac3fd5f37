"""Real checkpoints: one small file a family, from a config.json to a ModelSpec. No torch here.

A family is one function, `Config -> ModelSpec`, and a row of FAMILIES under the `model_type` that its
checkpoints carry. The values of known models ship as data (models.toml), in the words of their own
config.json, so that they pass through the same functions as a file from disk.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from trivet.config import UserError, nearest
from trivet.hub import deepseek, llama, minimax, qwen
from trivet.hub.config import Config
from trivet.spec import ModelSpec

FAMILIES: dict[str, Callable[[Config], ModelSpec]] = {
    "llama": llama.llama,
    "mixtral": llama.mixtral,
    "qwen2": qwen.qwen2,
    "qwen2_moe": qwen.qwen2_moe,
    "qwen3": qwen.qwen3,
    "qwen3_moe": qwen.qwen3_moe,
    "qwen3_next": qwen.qwen3_next,
    "deepseek_v2": deepseek.deepseek_v2,
    "deepseek_v3": deepseek.deepseek_v3,
    "minimax_m1": minimax.minimax,
    "minimax_text_01": minimax.minimax,
    "minimax": minimax.transformers_minimax,
    "minimax_m2": minimax.minimax_m2,
}


@dataclass(frozen=True)
class Described:
    """What a config.json says: the spec, what a user must know about it, and the words it was read from."""

    spec: ModelSpec
    notes: tuple[str, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def family(self) -> str:
        return str(self.config["model_type"])


def read_config(data: Mapping[str, Any], where: str) -> Described:
    """The spec behind a config.json. Raises UserError for a family or a value that is not computed."""
    config = Config(data, where)
    spec = read_spec(config)
    config.finish()
    return Described(spec, tuple(config.notes), data)


def read_spec(config: Config) -> ModelSpec:
    """What its family's reader makes of it; keys may be left over (`config.read` are those that were taken)."""
    kind, where = config.data.get("model_type"), config.where
    if kind not in FAMILIES:
        raise UserError(
            f"{where}: model_type {kind!r} is not known; there are {', '.join(FAMILIES)}.{nearest(str(kind), FAMILIES)}"
        )
    try:
        return FAMILIES[kind](config)
    except ValidationError as e:  # a spec that makes no sense
        first = e.errors()[0]
        place = ".".join(map(str, first["loc"]))  # none where values do not fit each other
        raise UserError(f"{where}: {place + ': ' if place else ''}{first['msg']} (from its values).") from None
    except (TypeError, ValueError, KeyError) as e:  # a value of the wrong type
        raise UserError(f"{where} has a value of a wrong type: {e}.") from None


def read_config_file(path: Path) -> Described:
    try:
        data = json.loads(path.read_text())
    except OSError as e:
        raise UserError(f"{path} can't be read: {e.strerror}.") from None
    except ValueError as e:
        raise UserError(f"{path} is not valid JSON: {e}.") from None
    if not isinstance(data, dict):
        raise UserError(f"{path} is no config.json: it holds a {type(data).__name__}, not an object.")
    return read_config(data, str(path))


# ------------------------------------------------------------------------------------ known by name
@cache
def catalog() -> dict[str, dict[str, Any]]:
    """Known models by short name: `hf`, `also`, `published`, `source` and `config`."""
    return tomllib.loads(files("trivet.hub").joinpath("models.toml").read_text())


def known_names() -> list[str]:
    return [name for name in catalog() if name != "undisclosed"]


def known_model(name: str) -> Described | None:
    """A known model by its short name or its name on the Hugging Face hub, in any case; None if it is neither.

    Raises UserError for a model whose architecture its maker has not published.
    """
    wanted = name.lower()
    for short, entry in catalog().items():
        if short == "undisclosed":
            for secret, title in entry.items():
                if wanted in (secret, title.lower()):
                    raise UserError(
                        f"{title}: its maker has published no architecture, so there is nothing to compute."
                    )
            continue
        full = [entry["hf"], *entry.get("also", ())]
        if wanted in [short, *(n.lower() for n in full), *(n.lower().rpartition("/")[2] for n in full)]:
            return read_config(entry["config"], short)
    return None
