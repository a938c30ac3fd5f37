"""Training state on disk: everything that the next step depends on, exactly.

    resume/step-00000120/   model.safetensors  optimizer.safetensors  state.json
                            model-00001-of-00004.safetensors ...      where four processes each wrote their part

Each state is an atomic folder; the last two are kept. Nothing else is state: the data is a pure
function of an index, and randomness is seeded anew at every step. Frozen parameters are where the run
started and are not stored: with LoRA a state is the adapters. Never pickle, which is why this is not
torch.distributed.checkpoint: its index is a pickle.

A file of parts says in its header where in the whole each of its tensors begins. Whoever resumes reads
from all files what overlaps with its own part, so a run may go on with another number of processes, or
with one. The folder must be one that all processes see.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from trivet.config import UserError
from trivet.disk import atomic_dir, disk_error, partial, settle_all
from trivet.model.experts import plain_name
from trivet.model.io import save_tensors
from trivet.train.optim import Optimizer
from trivet.train.parallel import ALONE, Part, Parts, Ranks, local

KEPT = 2


@dataclass(frozen=True)
class State:
    """A stored training state. `apply` puts it into a model and an optimizer of the same shape."""

    path: Path
    step: int
    config: dict[str, Any]
    extra: dict[str, Any]

    @torch.no_grad()
    def apply(self, model: nn.Module, optimizer: Optimizer) -> None:
        """On several processes, what each holds of it."""
        parts = optimizer.parts
        with ExitStack() as open_files:
            stored = Stored(self.path, "model", open_files)
            mine = _changing(model)
            for name in sorted(mine.keys() ^ stored.names):
                where = "unexpected" if name in stored.names else "missing"
                raise UserError(f"{self.path} does not belong to this model: {name!r} is {where}.")
            for name, tensor in mine.items():
                tensor.copy_(stored.read(name, tensor, parts.get(name)))
            stored = Stored(self.path, "optimizer", open_files)
            empty = optimizer.state_dict()
            held = {
                name: stored.read(name, empty[name], parts.get(name.partition(".")[2]))
                if name in empty
                else torch.empty(0)
                for name in stored.names
            }
            optimizer.load_state_dict(held)


class Stored:
    """The tensors of a state, in however many files they are. Opening them finds out whether they are whole."""

    def __init__(self, path: Path, what: str, open_files: ExitStack) -> None:
        self.path = path
        self.places: dict[str, list[tuple[Any, list[int]]]] = {}  # name -> files and where their piece begins
        for file in sorted(path.glob(f"{what}*.safetensors")):
            opened = open_files.enter_context(safe_open(file, "pt"))
            starts = json.loads((opened.metadata() or {}).get("starts", "{}"))
            for name in opened.keys():  # noqa: SIM118 (it is no mapping)
                self.places.setdefault(name, []).append((opened, starts.get(name, [])))

    @property
    def names(self) -> set[str]:
        return set(self.places)

    def read(self, name: str, like: Tensor, part: Part | None) -> Tensor:
        """The numbers of a tensor that belong into `like`, which is `part` of it. UserError where some are missing."""
        out, found = torch.empty_like(like, device="cpu"), 0
        begin = part.start if part is not None else (0,) * like.ndim
        for file, there in self.places[name]:
            piece = file.get_slice(name)
            size = piece.get_shape()
            if len(size) != like.ndim:
                raise UserError(f"{self.path} does not belong to this model: {name!r} has shape {size}.")
            if like.ndim == 0:
                return file.get_tensor(name)
            at = there or [0] * like.ndim
            low = [max(a, b) for a, b in zip(begin, at, strict=True)]
            high = [min(a + n, b + m) for a, n, b, m in zip(begin, like.shape, at, size, strict=True)]
            if all(a < b for a, b in zip(low, high, strict=True)):
                to, of = (
                    tuple(slice(a - c, b - c) for a, b, c in zip(low, high, corner, strict=True))
                    for corner in (begin, at)
                )
                out[to] = piece[of]
                found += out[to].numel()
            if part is None and not there and size != list(like.shape):
                raise UserError(
                    f"{self.path} does not belong to this model: {name!r} has shape {size}, not {list(like.shape)}."
                )
        if found != out.numel():
            raise UserError(
                f"{self.path} is damaged or of another model: {out.numel() - found} numbers of {name!r} are missing."
            )
        return out


def save_state(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: Optimizer,
    config: Mapping[str, Any],
    extra: Mapping[str, Any],
    ranks: Ranks = ALONE,
) -> Path:
    """Store the state after `step` optimizer steps; config and extra are JSON values."""
    final = folder / f"step-{step:08d}"
    scalars = json.dumps({"step": step, "config": config, "extra": extra}, indent=1)  # a setting may be inf
    if ranks.world > 1:
        _save_together(final, model, optimizer, scalars, ranks)
    else:
        with atomic_dir(final) as aside:
            save_tensors(_changing(model), aside / "model.safetensors")
            save_tensors(optimizer.state_dict(), aside / "optimizer.safetensors")
            (aside / "state.json").write_text(scalars)
    if ranks.first:
        for old in _saved(folder)[:-KEPT]:
            shutil.rmtree(old)
    return final


def _save_together(final: Path, model: nn.Module, optimizer: Optimizer, scalars: str, ranks: Ranks) -> None:
    """Every process writes its part into one folder, which the first of them opens and puts into place."""
    with ExitStack() as folder:
        failed: UserError | None = None
        try:
            aside = folder.enter_context(atomic_dir(final)) if ranks.first else partial(final)
        except UserError as e:
            failed = e
        _all_or_none(failed, ranks)
        try:
            for what, tensors in (("model", _changing(model)), ("optimizer", optimizer.state_dict())):
                if optimizer.parts:
                    name = f"{what}-{ranks.rank + 1:05d}-of-{ranks.world:05d}.safetensors"
                    _save_parts(aside / name, what, tensors, optimizer.parts, ranks)
                elif ranks.first:  # every process holds all of it
                    save_tensors(tensors, aside / f"{what}.safetensors")
            if ranks.first:
                (aside / "state.json").write_text(scalars)
        except OSError as e:
            failed = disk_error(e, final)
        _all_or_none(failed, ranks)
    ranks.any(False)  # nobody goes on before it is in place


def _save_parts(path: Path, what: str, tensors: Mapping[str, Tensor], parts: Parts, ranks: Ranks) -> None:
    """Of what several processes hold, the first of them writes it."""
    kept, starts = {}, {}
    for name, tensor in tensors.items():
        part = parts.get(name if what == "model" else name.partition(".")[2])
        if tensor.numel() and (part.writes if part is not None else ranks.first):
            kept[name] = tensor
            if part is not None:
                starts[name] = part.start
    save_tensors(kept, path, starts=json.dumps(starts))


def _all_or_none(failed: UserError | None, ranks: Ranks) -> None:
    (any_failed,) = ranks.any(failed is not None)
    if any_failed:
        raise failed or UserError("Another process could not write its part of the state, so none was saved.")


def load_latest(folder: Path, config: Mapping[str, Any], ranks: Ranks = ALONE) -> State | None:
    """The last state, or None at the start of a run. Half-written ones are removed.

    Raises UserError where the state was made under another config, or is damaged.
    """
    if ranks.first:
        settle_all(folder)
    ranks.any(False)  # nobody looks before it is settled
    saved = _saved(folder)
    if not saved:
        return None
    path = saved[-1]
    try:
        scalars = json.loads((path / "state.json").read_text())
        step, stored, extra = scalars["step"], scalars["config"], scalars["extra"]
        with ExitStack() as open_files:
            for what in ("model", "optimizer"):
                if not Stored(path, what, open_files).names:
                    raise ValueError(f"no {what}.safetensors")
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
    return State(path, step, stored, extra)


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
    """What training changes, by plain names: of each tensor what this process holds."""
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    return {plain_name(name): local(tensor) for name, tensor in model.state_dict().items() if name not in frozen}


def _saved(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("step-*") if p.is_dir())
