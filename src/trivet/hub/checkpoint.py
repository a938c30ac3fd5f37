"""A checkpoint's safetensors, read shard by shard into a Transformer and written back.

Memory while loading: the weights, and one tensor of the shard at hand. Every tensor of the file has a
place (`names.py`) or is named in an error; so is every place that got none. FP8 weights of DeepSeek-V3's
kind are dequantised: w = float(w8) x scale of its 128 x 128 block.
"""

from __future__ import annotations

import json
import math
import warnings
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from trivet.chat import Chat
from trivet.config import UserError
from trivet.hub import read_config_file
from trivet.hub.adapter import base_of, family_of, is_adapter, load_adapter
from trivet.hub.names import FAMILY_NAMES, Slot, shared_copies, slots
from trivet.model import Transformer
from trivet.model.io import load_model, save_tensors

INDEX = "model.safetensors.index.json"
BLOCK = 128  # of an FP8 scale
SCALE = "_scale_inv"
DERIVED = (".inv_freq", ".slope_rate", ".query_decay", ".key_decay", ".diagonal_decay")


def load_checkpoint(
    directory: Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> Transformer:
    """A model in a family's own format. dtype None: as the embedding is stored.

    Raises UserError naming the first tensor that is missing, unknown, misshapen or damaged.
    """
    directory = Path(directory)
    config = directory / "config.json"
    described = read_config_file(config)
    for note in described.notes:
        warnings.warn(f"{directory}: {note}.", stacklevel=2)
    spec = described.spec
    family = json.loads(config.read_text())["model_type"]
    shards = Shards(directory)
    if spec.mtp and not any(name.startswith(f"model.layers.{len(spec.layers)}.") for name in shards.files):
        warnings.warn(f"{directory}: its config counts a prediction module, but none is stored.", stacklevel=2)
        spec = spec.model_copy(update={"mtp": 0})
    with torch.device("meta"):
        model = Transformer(spec, seed=None)
    shapes = model.state_dict()
    exact = {name for name, _ in model.named_buffers()}  # stay fp32
    wanted: dict[str, list[Slot]] = defaultdict(list)
    for slot in slots(spec, FAMILY_NAMES[family]):
        wanted[slot.theirs].append(slot)
    copies = shared_copies(spec)
    kept: dict[str, Tensor] = {}  # copies seen, until what they must equal is there
    ours: dict[str, Tensor] = {}
    if dtype is None:
        dtype = shards.dtype(next(iter(wanted)))
    for name, tensor in shards.tensors():
        if name not in wanted:
            if name in copies:
                kept[name] = tensor
            elif not _ignored(name, len(spec.layers), spec.mtp):
                raise UserError(f"{directory}: tensor {name!r} has no place in a {family} model.")
            continue
        for slot in wanted.pop(name):
            if slot.ours not in ours:
                kind = torch.float32 if slot.ours in exact else dtype
                ours[slot.ours] = torch.empty(shapes[slot.ours].shape, dtype=kind, device=device)
            place, part = ours[slot.ours][slot.at], _part(tensor, slot)
            if part.shape != place.shape:
                raise UserError(
                    f"{directory}: {name!r} has shape {tuple(tensor.shape)}, which does not fit the config: its part of "
                    f"{slot.ours!r} is {tuple(place.shape)}."
                )
            place.copy_(part)
    if wanted:
        names = sorted(wanted)
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise UserError(f"{directory} lacks the tensor {names[0]!r}{more}.")
    for name, tensor in kept.items():
        table = ours["embed" if spec.tie_embeddings or copies[name].endswith("embed_tokens.weight") else "head"]
        if not torch.equal(tensor.to(table), table):
            raise UserError(f"{directory}: {name!r} should be a copy of {copies[name]!r} and differs from it.")
    model.load_state_dict(ours, assign=True)
    return model.to(device)


def load_any(directory: Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Transformer:
    """A model of Trivet's own, a checkpoint of a known family, or an adapter of either, on its base."""
    if is_adapter(directory):
        base = base_of(directory)
        model = load_any(base, device, dtype)
        load_adapter(model, directory, family_of(base))
        return model
    config = Path(directory) / "config.json"
    try:
        known = json.loads(config.read_text()).get("model_type") in FAMILY_NAMES
    except (OSError, ValueError, AttributeError):
        known = False
    return load_checkpoint(directory, device, dtype) if known else load_model(directory, device, dtype)


def load_pair(
    directory: Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> tuple[Transformer, Chat]:
    """A model and what it reads and writes. Raises UserError where they do not belong together."""
    bare = is_adapter(directory) and not (Path(directory) / "tokenizer.json").is_file()
    model, chat = load_any(directory, device, dtype), Chat.load(base_of(directory) if bare else directory)
    if chat.vocab_size > model.spec.vocab_size:
        raise UserError(
            f"{directory}: its tokenizer knows {chat.vocab_size:,} tokens, its model only {model.spec.vocab_size:,}."
        )
    return model, chat


def save_checkpoint(model: Transformer, directory: Path, config: dict[str, Any], shard_bytes: int = 5 * 10**9) -> None:
    """Write a model in the format of the family that `config` (a config.json's content) names.

    Tensors keep the model's type, so what was loaded without conversion is written bit for bit.
    """
    state = model.state_dict()
    groups: dict[str, list[Slot]] = defaultdict(list)
    for slot in slots(model.spec, FAMILY_NAMES[config["model_type"]]):
        groups[slot.theirs].append(slot)
    shards: list[list[str]] = [[]]
    size = total = 0
    for name, parts in groups.items():
        bytes_here = sum(state[s.ours][s.at].nbytes for s in parts)
        if size and size + bytes_here > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size, total = size + bytes_here, total + bytes_here
    files = ["model.safetensors"] if len(shards) == 1 else [
        f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)
    ]  # fmt: skip
    for file, names in zip(files, shards, strict=True):
        save_tensors({name: _joined(state, groups[name]) for name in names}, directory / file)
    if len(files) > 1:
        where = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _part(tensor: Tensor, slot: Slot) -> Tensor:
    if slot.view:
        tensor = tensor.unflatten(0, (*slot.view, -1))[:, slot.pick].flatten(0, 1)
    return tensor.mT if slot.transposed else tensor


def _joined(state: dict[str, Tensor], parts: list[Slot]) -> Tensor:
    """The inverse of `_part`, over all slots of one of their tensors."""
    first = parts[0]
    if not first.view:
        part = state[first.ours][first.at]
        return part.mT if first.transposed else part
    ordered = sorted(parts, key=lambda s: s.pick or 0)
    return torch.stack([state[s.ours].unflatten(0, (s.view[0], -1)) for s in ordered], 1).flatten(0, 2)


def _ignored(name: str, layers: int, mtp: int) -> bool:
    """What follows from the config (tables of rotations and decays), and modules that the config does not count."""
    if name.endswith(DERIVED):
        return True
    return mtp == 0 and name.startswith(f"model.layers.{layers}.")


# -------------------------------------------------------------------------------------------- shards
class Shards:
    """The safetensors files of a directory, as one."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        if (directory / INDEX).is_file():
            try:
                self.files: dict[str, str] = json.loads((directory / INDEX).read_text())["weight_map"]
            except (ValueError, KeyError, TypeError):
                raise UserError(f"{directory / INDEX} is damaged: it has no weight_map.") from None
        elif (directory / "model.safetensors").is_file():
            self.files = {}
            with self._open("model.safetensors") as file:
                self.files = dict.fromkeys(file.keys(), "model.safetensors")
        else:
            pickles = [*directory.glob("*.bin"), *directory.glob("*.pt"), *directory.glob("*.pth")]
            why = f" {pickles[0].name} is a pickle, which can run code when it is read." if pickles else ""
            raise UserError(f"{directory} has no model.safetensors.{why}")

    def dtype(self, name: str) -> torch.dtype:
        """What a tensor is stored as."""
        if name not in self.files:
            raise UserError(f"{self.directory} lacks the tensor {name!r}.")
        with self._open(self.files[name]) as file:
            found: torch.dtype = file.get_tensor(name).dtype
        return found

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) file by file, FP8 weights dequantised to fp32 with their scales."""
        for shard in sorted(set(self.files.values())):
            with self._open(shard) as file:
                stored = set(file.keys())
                for name in sorted(stored | {n for n, f in self.files.items() if f == shard}):
                    if name not in stored:
                        raise UserError(f"{self.directory / shard} lacks {name!r}, which its index says is there.")
                    if name.endswith(SCALE):
                        continue  # read with its weight
                    tensor = file.get_tensor(name)
                    if tensor.dtype == torch.float8_e4m3fn:
                        tensor = dequantised(tensor, self._scale(name + SCALE), name)
                    yield name, tensor

    def _scale(self, name: str) -> Tensor:
        if name not in self.files:
            raise UserError(f"{self.directory} lacks {name!r}, the scale of an FP8 weight.")
        with self._open(self.files[name]) as file:
            scale: Tensor = file.get_tensor(name)
        return scale

    def _open(self, file: str) -> Any:
        path = self.directory / file
        if not path.is_file():
            raise UserError(f"{path} is missing: the checkpoint's index names it.")
        try:
            return safe_open(path, framework="pt")
        except (SafetensorError, OSError) as e:
            raise UserError(f"{path} is damaged, cut short, or not a safetensors file: {e}.") from None


def dequantised(weight: Tensor, scale: Tensor, name: str) -> Tensor:
    """[N,K] FP8 x the scale of each 128 x 128 block -> fp32 [N,K]."""
    rows, columns = (math.ceil(n / BLOCK) for n in weight.shape)
    if scale.shape != (rows, columns):
        raise UserError(f"{name!r}: its scale has shape {tuple(scale.shape)}, not {(rows, columns)}.")
    spread = scale.float().repeat_interleave(BLOCK, 0)[: weight.shape[0]].repeat_interleave(BLOCK, 1)
    return weight.float() * spread[:, : weight.shape[1]]
