"""Which model a directory's adapter belongs to. No torch here: `trivet plan` asks, too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trivet.config import UserError

CONFIG = "adapter_config.json"


def is_adapter(directory: Path) -> bool:
    return (Path(directory) / CONFIG).is_file()


def base_of(directory: Path) -> Path:
    """The model that a directory's adapter belongs to; the directory itself if it holds a model."""
    if not is_adapter(directory):
        return Path(directory)
    path = Path(directory) / CONFIG
    named = read_adapter_config(path).get("base_model_name_or_path")
    if not isinstance(named, str) or not Path(named).is_dir():
        raise UserError(
            f"{directory} is an adapter for {named!r}, which is no directory here: write the path of that model into "
            f"base_model_name_or_path of {path}."
        )
    if is_adapter(Path(named)):
        raise UserError(f"{directory} is an adapter for {named!r}, which is an adapter itself: merge that one first.")
    return Path(named)


def family_of(base: Path) -> str:
    """The model_type of a model directory: how its modules are called."""
    try:
        return str(json.loads((base / "config.json").read_text()).get("model_type"))
    except (OSError, ValueError, AttributeError):
        return ""  # whoever loads the model says what is wrong with it


def read_adapter_config(path: Path) -> dict[str, Any]:
    """The object in an adapter_config.json. Raises UserError where there is none."""
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as e:
        raise UserError(f"{path} can't be read: {e}.") from None
    if not isinstance(config, dict):
        raise UserError(f"{path} is no adapter_config.json: it holds a {type(config).__name__}, not an object.")
    return config
