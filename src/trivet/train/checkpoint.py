"""Training state on disk: everything that the next step depends on, exactly.

    resume/step-00000120/   model.safetensors  optimizer.safetensors  state.json

Each state is an atomic folder; the last two are kept. Nothing else is state: the data is a pure
function of an index, and randomness is seeded anew at every step. Frozen parameters are where the run
started and are not stored: with LoRA a state is the adapters. Never pickle.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from trivet.config import UserError
from trivet.disk import atomic_dir, settle_all
from trivet.model.io import save_tensors
from trivet.train.optim import Optimizer

KEPT = 2


@dataclass(frozen=True)
class State:
    """A stored training state. `apply` puts it into a model and an optimizer of the same shape."""

    path: Path
    step: int
    config: dict[str, Any]
    extra: dict[str, Any]
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]

    def apply(self, model: nn.Module, optimizer: Optimizer) -> None:
        for name in sorted(_changing(model).keys() ^ self.model.keys()):
            where = "unexpected" if name in self.model else "missing"
            raise UserError(f"{self.path} does not belong to this model: {name!r} is {where}.")
        try:
            model.load_state_dict(self.model, strict=False)
        except RuntimeError as e:
            raise UserError(f"{self.path} does not belong to this model: {str(e).splitlines()[-1].strip()}") from None
        optimizer.load_state_dict(self.optimizer)


def save_state(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: Optimizer,
    config: Mapping[str, Any],
    extra: Mapping[str, Any],
) -> Path:
    """Store the state after `step` optimizer steps; config and extra are JSON values."""
    final = folder / f"step-{step:08d}"
    with atomic_dir(final) as aside:
        save_tensors(_changing(model), aside / "model.safetensors")
        save_tensors(optimizer.state_dict(), aside / "optimizer.safetensors")
        scalars = {"step": step, "config": config, "extra": extra}
        (aside / "state.json").write_text(json.dumps(scalars, indent=1, allow_nan=False))
    for old in _saved(folder)[:-KEPT]:
        shutil.rmtree(old)
    return final


def load_latest(folder: Path, config: Mapping[str, Any]) -> State | None:
    """The last state, or None at the start of a run. Half-written ones are removed.

    Raises UserError where the state was made under another config, or is damaged.
    """
    settle_all(folder)
    saved = _saved(folder)
    if not saved:
        return None
    path = saved[-1]
    try:
        scalars = json.loads((path / "state.json").read_text())
        step, stored, extra = scalars["step"], scalars["config"], scalars["extra"]
        model, optimizer = load_file(path / "model.safetensors"), load_file(path / "optimizer.safetensors")
    except (OSError, ValueError, KeyError, SafetensorError) as e:
        back = f"from {saved[-2].name}" if len(saved) > 1 else "from the start"
        raise UserError(f"{path} is damaged ({e}). Delete that folder to continue {back}.") from None
    different = first_difference(stored, json.loads(json.dumps(config)))
    if different is not None:
        key, was, is_now = different
        raise UserError(
            f"{folder} was made with {key} = {was}, now it is {is_now}: set it back to resume, "
            "or give this run another folder."
        )
    return State(path, step, stored, extra, model, optimizer)


def first_difference(old: Any, new: Any, key: str = "") -> tuple[str, str, str] | None:
    """(dotted key, old value, new value) of the first place where two JSON values differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in [*old, *(n for n in new if n not in old)]:
            if name not in old or name not in new:
                at = f"{key}{name}"
                return at, repr(old.get(name, "not there")), repr(new.get(name, "not there"))
            found = first_difference(old[name], new[name], f"{key}{name}.")
            if found is not None:
                return found
        return None
    return None if old == new else (key.removesuffix("."), repr(old), repr(new))


def _changing(model: nn.Module) -> dict[str, Tensor]:
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in frozen}


def _saved(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("step-*") if p.is_dir())
