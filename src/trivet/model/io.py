"""A model on disk: config.json (the spec) and model.safetensors, nothing else and never pickle."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from trivet.config import UserError, validate
from trivet.model.transformer import Transformer
from trivet.spec import ModelSpec


def save_model(model: Transformer, directory: Path) -> None:
    """Write config.json and model.safetensors into an existing directory (see disk.atomic_dir)."""
    config = {
        "model_type": "trivet",
        "architectures": ["TrivetForCausalLM"],
        "torch_dtype": str(model.embed.dtype).removeprefix("torch."),
        "spec": model.spec.model_dump(mode="json"),
    }
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_tensors(model.state_dict(), directory / "model.safetensors")


def load_spec(directory: Path) -> ModelSpec:
    """The spec of a model directory. Raises UserError where there is none that Trivet can read."""
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise UserError(f"{str(directory)!r} is no model directory: it has no config.json.")
    try:
        config = json.loads(path.read_text())
    except ValueError as e:
        raise UserError(f"{path} is not valid JSON: {e}.") from None
    if not isinstance(config, dict):
        raise UserError(f"{path} is no config.json: it holds a {type(config).__name__}, not an object.")
    if config.get("model_type") != "trivet":
        raise UserError(f"{path} has model_type {config.get('model_type')!r}; this version reads 'trivet' only.")
    return validate(config.get("spec", {}), ModelSpec, str(path))


def load_model(directory: Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Transformer:
    """Read a model. Raises UserError naming the first missing, extra or misshapen tensor."""
    with torch.device("meta"):  # its weights are about to be read
        model = Transformer(load_spec(directory), seed=None)
    path = Path(directory) / "model.safetensors"
    if not path.is_file():
        raise UserError(f"{str(directory)!r} has a config.json but no model.safetensors.")
    try:
        tensors = load_file(path)
    except SafetensorError as e:
        raise UserError(f"{path} is damaged or not a safetensors file: {e}.") from None
    expected = model.state_dict()
    for name in sorted(expected.keys() ^ tensors.keys()):
        raise UserError(f"{path}: tensor {name!r} is {'missing' if name in expected else 'not part of the model'}.")
    for name, t in tensors.items():
        if t.shape != expected[name].shape:
            raise UserError(
                f"{path}: {name!r} has shape {tuple(t.shape)}, the spec says {tuple(expected[name].shape)}."
            )
    model.load_state_dict(tensors, assign=True)
    return model.to(device=device, dtype=dtype or tensors["embed"].dtype)


def save_tensors(tensors: Mapping[str, Tensor], path: Path, **metadata: str) -> None:
    """safetensors, where a full disk is an OSError like everywhere else."""
    try:
        save_file(
            {name: t.detach().contiguous() for name, t in tensors.items()}, path, metadata={"format": "pt", **metadata}
        )
    except SafetensorError as e:
        number = re.search(r"\(os error (\d+)\)", str(e))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from e
