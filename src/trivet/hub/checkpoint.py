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
from collections.abc import Callable, Collection, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from trivet.chat import Chat
from trivet.config import UserError
from trivet.hub import read_config_file
from trivet.hub.adapter import load_adapter
from trivet.hub.base import base_of, family_of, is_adapter
from trivet.hub.names import FAMILY_NAMES, Names, Slot, shared_copies, slots
from trivet.hub.part import Numbers, cut
from trivet.model import Transformer
from trivet.model.io import load_model, load_spec, save_tensors
from trivet.spec import Lightning, ModelSpec, with_chunks, with_yarn

INDEX = "model.safetensors.index.json"
BLOCK = 128  # of an FP8 scale
SCALE = "_scale_inv"
STORED = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
DERIVED = (".inv_freq", ".slope_rate", ".query_decay", ".key_decay", ".diagonal_decay")


def load_checkpoint(
    directory: Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    layers: Numbers = None,
    experts: Numbers = None,
) -> Transformer:
    """A model in a family's own format, or a part of it (`part.py`). dtype None: as the embedding is stored.

    Of a part, only what it needs is read: shards without any of it may be absent. Raises UserError naming the
    first tensor that is missing, unknown, misshapen or damaged; what is missing or unknown before weights are read.
    """
    directory = Path(directory)
    described = read_config_file(directory / "config.json")
    for note in described.notes:
        warnings.warn(f"{directory}: {note}.", stacklevel=2)
    names, shards = FAMILY_NAMES[described.family], Shards(directory)
    whole = with_stored_modules(described.spec, names, shards)
    if whole.mtp < described.spec.mtp:
        warnings.warn(f"{directory}: its config counts a prediction module, but none is stored.", stacklevel=2)
    spec, part = cut(whole, layers, experts, str(directory))
    if layers is not None and any(isinstance(layer.mixer, Lightning) for layer in spec.layers):
        warnings.warn(f"{directory}: lightning attention decays by depth, in this part as in a model of its depth.", stacklevel=2)  # fmt: skip
    with torch.device("meta"):
        model = Transformer(spec, seed=None)
    wanted: dict[str, list[Slot]] = defaultdict(list)
    for slot in slots(spec, names, part):
        wanted[slot.theirs].append(slot)
    account_for(shards, whole, described.family)
    missing = sorted(wanted.keys() - shards.files.keys())
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"{directory} lacks the tensor {missing[0]!r}{more}.")
    ours = _read(shards, wanted, model, dtype or shards.read(next(iter(wanted))).dtype, device)
    for name, original in shared_copies(spec, names).items():
        if name in shards.files:
            table = ours["embed" if original.endswith("embed_tokens.weight") else "head"]
            if not torch.equal(shards.read(name).to(table), table):
                raise UserError(f"{directory}: {name!r} should be a copy of {original!r} and differs from it.")
    model.load_state_dict(ours, assign=True)
    return model.to(device)


def with_stored_modules(spec: ModelSpec, names: Names, shards: Shards) -> ModelSpec:
    """The spec with the prediction modules that are there: some files count what they lack, or have what none counts."""
    stored = any(name.startswith(names.module(spec, 0)) for name in shards.files)
    counted = spec.mtp if names.mtp_counted else 1
    return spec.model_copy(update={"mtp": counted if stored else 0})


def account_for(shards: Shards, spec: ModelSpec, family: str) -> None:
    """Raises UserError for a stored tensor that has no place in a model of this spec. Reads names only."""
    names = FAMILY_NAMES[family]
    spec = with_stored_modules(spec, names, shards)
    known = {slot.theirs for slot in slots(spec, names)} | shared_copies(spec, names).keys()
    for name in shards.files:
        if name.removesuffix(SCALE) not in known and not _ignored(name, spec, names):
            raise UserError(f"{shards.directory}: tensor {name!r} has no place in a {family} model.")


def _read(
    shards: Shards, wanted: dict[str, list[Slot]], model: Transformer, dtype: torch.dtype, device: torch.device | str
) -> dict[str, Tensor]:
    """Our state dict, filled tensor by tensor."""
    shapes = model.state_dict()
    exact = {name for name, _ in model.named_buffers()}  # stay fp32
    ours: dict[str, Tensor] = {}
    for name, tensor in shards.tensors(wanted):
        for slot in wanted[name]:
            if slot.ours not in ours:
                kind = torch.float32 if slot.ours in exact else dtype
                ours[slot.ours] = torch.empty(shapes[slot.ours].shape, dtype=kind, device=device)
            place, part = ours[slot.ours][slot.at], _part(tensor, slot)
            if part.shape != place.shape:
                raise UserError(
                    f"{shards.directory}: {name!r} has shape {tuple(tensor.shape)}, which does not fit the config: its part of "
                    f"{slot.ours!r} is {tuple(place.shape)}."
                )
            place.copy_(part)
    return ours


def load_any(
    directory: Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    layers: Numbers = None,
    experts: Numbers = None,
) -> Transformer:
    """A model of Trivet's own, a checkpoint of a known family (or a part of one), or an adapter of either, on its base."""
    if is_adapter(directory):
        if layers is not None or experts is not None:
            raise UserError(f"{directory}: parts are taken of a whole checkpoint; export this adapter merged, then a part of it.")  # fmt: skip
        base = base_of(directory)
        model = load_any(base, device, dtype)
        load_adapter(model, directory, family_of(base))
        return model
    if is_family(directory):
        return load_checkpoint(directory, device, dtype, layers, experts)
    if layers is not None or experts is not None:
        raise UserError(f"{directory}: parts are taken of a family's checkpoint; export this model first.")
    return load_model(directory, device, dtype)


def load_pair(
    directory: Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    rope_yarn: float | None = None,
    dual_chunk: float | None = None,
) -> tuple[Transformer, Chat]:
    """A model and what it reads and writes. Raises UserError where they do not belong together, before weights are read.

    rope_yarn, dual_chunk: its context times this, by YaRN or by dual chunks (`spec/extend.py`), with a warning.
    """
    base = base_of(directory) if is_adapter(directory) else directory
    spec = read_config_file(base / "config.json").spec if is_family(base) else load_spec(base)
    chat = Chat.load(directory if (directory / "tokenizer.json").is_file() else base)
    if chat.vocab_size > spec.vocab_size:
        raise UserError(
            f"{directory}: its tokenizer knows {chat.vocab_size:,} tokens, its model only {spec.vocab_size:,}."
        )
    model = load_any(directory, device, dtype)
    for extend, factor in ((with_yarn, rope_yarn), (with_chunks, dual_chunk)):
        if factor is not None:
            spec, said = extend(model.spec, factor)
            warnings.warn(f"{directory}: {said}.", stacklevel=2)
            model = model.with_spec(spec)
    return model, chat


def is_family(directory: Path) -> bool:
    """Whether a directory is a checkpoint of a known family."""
    try:
        return json.loads((Path(directory) / "config.json").read_text()).get("model_type") in FAMILY_NAMES
    except (OSError, ValueError, AttributeError):
        return False


def save_checkpoint(
    model: Transformer,
    directory: Path,
    config: dict[str, Any],
    shard_bytes: int = 5 * 10**9,
    like: Shards | None = None,
) -> None:
    """Write a model in the format of the family that `config` (a config.json's content) names.

    Tensors keep the model's type, so what was loaded without conversion is written bit for bit. `like`: the
    checkpoint it came from; what that stores beside parameters is then written again (`_beside`).
    """
    state = model.state_dict()
    family = FAMILY_NAMES[config["model_type"]]
    groups: dict[str, list[Slot]] = defaultdict(list)
    for slot in slots(model.spec, family):
        groups[slot.theirs].append(slot)
    tensors: dict[str, Callable[[], Tensor]] = {name: partial(_joined, state, parts) for name, parts in groups.items()}
    if like is not None:
        tensors |= _beside(model.spec, family, tensors, like)
    shards: list[list[str]] = [[]]
    size = total = 0
    for name, tensor in tensors.items():
        bytes_here = sum(state[s.ours][s.at].nbytes for s in groups[name]) if name in groups else tensor().nbytes
        if size and size + bytes_here > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size, total = size + bytes_here, total + bytes_here
    files = ["model.safetensors"] if len(shards) == 1 else [
        f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)
    ]  # fmt: skip
    for file, names in zip(files, shards, strict=True):
        save_tensors({name: tensors[name]() for name in names}, directory / file)
    if len(files) > 1:
        where = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _beside(
    spec: ModelSpec, names: Names, parameters: dict[str, Callable[[], Tensor]], like: Shards
) -> dict[str, Callable[[], Tensor]]:
    """What a checkpoint stores that is no parameter: second copies, as they are now; the rest as it was."""
    copies = shared_copies(spec, names)
    found: dict[str, Callable[[], Tensor]] = {}
    for name in like.files:
        if name in copies:
            found[name] = lambda of=copies[name]: parameters[of]().clone()  # type: ignore[misc]
        elif name not in parameters and not name.endswith(SCALE) and _ignored(name, spec, names):
            found[name] = partial(like.read, name)
    return found


def _part(tensor: Tensor, slot: Slot) -> Tensor:
    if slot.rows and len(tensor) > slot.rows[-1]:  # else its shape is found wrong
        tensor = tensor[list(slot.rows)]
    if slot.groups and len(tensor) == slot.groups * sum(slot.sizes):  # likewise
        tensor = tensor.unflatten(0, (slot.groups, -1)).split(slot.sizes, 1)[slot.pick].flatten(0, 1)
    return tensor.mT if slot.transposed else tensor


def _joined(state: dict[str, Tensor], parts: list[Slot]) -> Tensor:
    """The inverse of `_part`, over all slots of one of their tensors."""
    first = parts[0]
    if not first.groups:
        part = state[first.ours][first.at]
        return part.mT if first.transposed else part
    ordered = sorted(parts, key=lambda s: s.pick)
    return torch.cat([state[s.ours].unflatten(0, (s.groups, -1)) for s in ordered], 1).flatten(0, 1)


def _ignored(name: str, spec: ModelSpec, names: Names) -> bool:
    """What follows from the config (tables of rotations and decays), and modules that the config does not count."""
    if name.endswith(DERIVED):
        return True
    return names.mtp_counted and spec.mtp == 0 and name.startswith(names.module(spec, 0))


# -------------------------------------------------------------------------------------------- shards
class Shards:
    """The safetensors files of a directory, as one. `files`: which file holds which tensor."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        if (directory / INDEX).is_file():
            try:
                self.files: dict[str, str] = dict(json.loads((directory / INDEX).read_text())["weight_map"])
            except (ValueError, KeyError, TypeError):
                raise UserError(f"{directory / INDEX} is damaged: it has no weight_map.") from None
            for name, file in self.files.items():
                if not isinstance(file, str) or Path(file).name != file:
                    raise UserError(
                        f"{directory / INDEX}: {name!r} is said to be in {file!r}, which is no file beside it."
                    )
        elif (directory / "model.safetensors").is_file():
            self.files = {}
            with self._open("model.safetensors") as file:
                self.files = dict.fromkeys(file.keys(), "model.safetensors")
        else:
            pickles = [*directory.glob("*.bin"), *directory.glob("*.pt"), *directory.glob("*.pth")]
            why = f" {pickles[0].name} is a pickle, which can run code when it is read." if pickles else ""
            raise UserError(f"{directory} has no model.safetensors.{why}")

    def read(self, name: str) -> Tensor:
        """One tensor as it is stored, a view of its file."""
        with self._open(self.files[name]) as file:
            return self._get(file, name)

    def tensors(self, names: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) file by file, FP8 weights dequantised to fp32 with their scales."""
        for shard in sorted({self.files[name] for name in names}):
            with self._open(shard) as file:
                for name in sorted(set(file.keys()) - self.files.keys()):
                    if not name.endswith(DERIVED):
                        raise UserError(f"{self.directory / shard} has {name!r}, which its index does not name.")
                for name in sorted(n for n in names if self.files[n] == shard):
                    tensor = self._get(file, name)
                    if tensor.dtype == torch.float8_e4m3fn:
                        tensor = dequantised(tensor, self._scale(name + SCALE), name)
                    elif tensor.dtype not in STORED:
                        raise UserError(
                            f"{self.directory}: {name!r} is stored as {str(tensor.dtype).removeprefix('torch.')}, "
                            "a quantised form that is not computed; take the checkpoint in bf16."
                        )
                    yield name, tensor

    def _get(self, file: Any, name: str) -> Tensor:
        try:
            tensor: Tensor = file.get_tensor(name)
        except SafetensorError:
            raise UserError(
                f"{self.directory / self.files[name]} lacks {name!r}, which its index says is there."
            ) from None
        return tensor

    def _scale(self, name: str) -> Tensor:
        if name not in self.files:
            raise UserError(f"{self.directory} lacks {name!r}, the scale of an FP8 weight.")
        return self.read(name)

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
