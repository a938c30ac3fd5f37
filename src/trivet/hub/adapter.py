"""LoRA adapters in PEFT's format, both ways: adapter_config.json and adapter_model.safetensors.

    base_model.model.<module>.lora_A.weight [r,in]    base_model.model.<module>.lora_B.weight [out,r]

Modules have the names of the base's family (`names.py`). Where several of our matrices are one of theirs
(lightning attention's qkv_proj, Qwen3-Next's in_proj_qkvz, in_proj_ba and its q_proj with the gate), their adapter
holds ours side by side: A on top of each other, B in blocks, with as many times the rank and the same scale. An adapter of ours also says on which weights it was trained
(`fingerprint`), and is refused on others.

In families with experts only attention is adapted: there PEFT takes gate_proj, up_proj and down_proj, wherever
they stand, for the routed experts' grouped weights, so an adapter of a dense or shared ffn has no name.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from trivet.config import UserError, nearest
from trivet.hub.base import CONFIG, read_adapter_config
from trivet.hub.names import FAMILY_NAMES, Names, Slot, slots
from trivet.model import Transformer
from trivet.model.io import save_tensors
from trivet.model.layers import Adapter
from trivet.model.lora import LoRA, Place, Size, adapters, attach, fingerprint, places
from trivet.spec import MoE

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
READ = (
    "peft_type",
    "base_model_name_or_path",
    "r",
    "lora_alpha",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "target_modules",
)
# What the tensors themselves say, what matters in training only, and what is bookkeeping.
HARMLESS = (
    "layers_to_transform", "layers_pattern", "exclude_modules", "lora_dropout", "auto_mapping", "inference_mode",
    "peft_version", "revision", "task_type", "runtime_config", "megatron_core", "qalora_group_size",
)  # fmt: skip
NEUTRAL: dict[str, tuple[Any, ...]] = {"bias": ("none",), "init_lora_weights": (True, False, "gaussian", "orthogonal")}


# -------------------------------------------------------------------------------------------- choosing
def modules(model: Transformer, family: str) -> dict[str, list[Slot]]:
    """Their modules that can be adapted, each with the places in ours that it is made of."""
    ours = set(places(model))
    if family in FAMILY_NAMES and _sparse(model):
        ours = {(name, at) for name, at in ours if ".mixer." in name}
    found: dict[str, list[Slot]] = defaultdict(list)
    for slot in slots(model.spec, FAMILY_NAMES.get(family, Names())):
        if (slot.ours, slot.at) in ours:
            found[slot.theirs.removesuffix(".weight")].append(slot)
    return dict(found)


def choose(model: Transformer, family: str, lora: LoRA) -> dict[Place, Size]:
    """What to attach: the targets, or every projection. Raises UserError for a target that matches none."""
    there = modules(model, family)
    for target in lora.targets or ():
        if not any(_matches(module, target) for module in there):
            known = sorted({_leaf(module) for module in there})
            experts = (
                " Routed experts take no adapter, nor does any ffn beside them that PEFT can't name."
                if _sparse(model)
                else ""
            )
            raise UserError(
                f"lora.targets: no projection of this model is called {target!r}; there are {', '.join(known)}."
                f"{experts}{nearest(target, known)}"
            )
    chosen = [m for m in there if lora.targets is None or any(_matches(m, target) for target in lora.targets)]
    return {(s.ours, s.at): Size(lora.rank, lora.alpha, lora.rslora) for module in chosen for s in there[module]}


def _sparse(model: Transformer) -> bool:
    return any(isinstance(layer.ffn, MoE) for layer in model.spec.layers)


def _matches(module: str, target: str) -> bool:
    return module == target or module.endswith("." + target)  # PEFT's rule for a list


def _leaf(module: str) -> str:
    return module.rpartition(".")[2]


# --------------------------------------------------------------------------------------------- writing
def save_adapter(model: Transformer, directory: Path, base: Path, family: str) -> None:
    """Write a model's adapters into an existing directory (see disk.atomic_dir), in their own type.

    Raises UserError for one that has no name in the family.
    """
    mine = adapters(model)
    tensors: dict[str, Tensor] = {}
    sizes: dict[str, Size] = {}
    there = modules(model, family)
    for name, at in mine.keys() - {(slot.ours, slot.at) for parts in there.values() for slot in parts}:
        raise UserError(f"The adapter of {name!r} {at or ''} has no name in PEFT's format for {family}.")
    for module, parts in there.items():
        held = [mine[slot.ours, slot.at] for slot in parts if (slot.ours, slot.at) in mine]
        if not held:
            continue
        a, b = _joined(parts, held)
        tensors[f"{PREFIX}{module}.lora_A.weight"], tensors[f"{PREFIX}{module}.lora_B.weight"] = a, b
        size = Size(held[0].rank, held[0].alpha, held[0].rslora)
        sizes[module] = _times(size, len(held))
    common = Counter(sizes.values()).most_common(1)[0][0]
    leaves = sorted({_leaf(module) for module in sizes})
    whole = all(module in sizes for module in there if _leaf(module) in leaves)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base.resolve()),
        "r": common.rank,
        "lora_alpha": _number(common.alpha),
        "use_rslora": common.rslora,
        "target_modules": leaves if whole else sorted(sizes),
        "rank_pattern": {m: size.rank for m, size in sizes.items() if size.rank != common.rank},
        "alpha_pattern": {m: _number(size.alpha) for m, size in sizes.items() if size.alpha != common.alpha},
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
    save_tensors(tensors, directory / WEIGHTS, base=fingerprint(model))
    (directory / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def _times(size: Size, n: int) -> Size:
    """n adapters as one of n times the rank and the same scale."""
    return Size(size.rank * n, size.alpha * (math.sqrt(n) if size.rslora else n), size.rslora)


def _number(alpha: float) -> float:
    return int(alpha) if alpha == int(alpha) else alpha


def _joined(parts: Sequence[Slot], held: Sequence[Adapter]) -> tuple[Tensor, Tensor]:
    """(A, B) of one of their modules, of our adapters of its parts."""
    if len(held) == 1:
        return held[0].a, held[0].b
    groups = parts[0].groups
    b = [adapter.b.detach().unflatten(0, (groups, -1)).mT for adapter in held]  # [groups,r,rows of one part]
    blocks = torch.stack([torch.block_diag(*group) for group in zip(*b, strict=True)])  # [groups,n*r,rows]
    return torch.cat([adapter.a.detach() for adapter in held]), blocks.mT.flatten(0, 1)


# --------------------------------------------------------------------------------------------- reading
def load_adapter(model: Transformer, directory: Path, family: str) -> None:
    """Give a base model the adapter in a directory. Raises UserError for what would not be computed."""
    path = Path(directory) / CONFIG
    config = read_adapter_config(path)
    _check_config(path, config)
    tensors, trained_on = _read_tensors(Path(directory) / WEIGHTS)
    if trained_on is not None and trained_on != fingerprint(model):
        raise UserError(f"{directory} was trained on other weights than {config['base_model_name_or_path']} holds now.")
    there = modules(model, family)
    pairs: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        found = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.lora_([AB])\.weight", name)
        if found is None or found[1] not in there:
            raise UserError(f"{directory}: its tensor {name!r} adapts nothing that can be adapted in this base.")
        pairs[found[1]][found[2]] = tensor
    for module in there:
        if _asked_for(config, module) and set(pairs[module]) != {"A", "B"}:
            raise UserError(f"{directory}: it targets {module!r} but lacks its lora_A or lora_B.")
    parts: dict[Place, tuple[Size, Tensor, Tensor]] = {}
    for module, pair in pairs.items():
        if pair:
            size = _size(config, module)
            parts |= _parts(there[module], size, pair["A"], pair["B"], f"{directory}: {module!r}")
    attach(model, {place: size for place, (size, _, _) in parts.items()})
    for place, adapter in adapters(model).items():
        _, a, b = parts[place]
        if adapter.a.shape != a.shape or adapter.b.shape != b.shape:
            raise UserError(
                f"{directory}: the adapter of {place[0]!r} has shapes {tuple(a.shape)} and {tuple(b.shape)}, this base "
                f"needs {tuple(adapter.a.shape)} and {tuple(adapter.b.shape)}."
            )
        with torch.no_grad():
            adapter.a.copy_(a)
            adapter.b.copy_(b)


def _parts(
    slots_here: Sequence[Slot], size: Size, a: Tensor, b: Tensor, where: str
) -> dict[Place, tuple[Size, Tensor, Tensor]]:
    """One of their adapters as ours: the inverse of `_joined`, or A as it is for each part if PEFT trained it."""
    if len(slots_here) == 1:
        return {(slots_here[0].ours, slots_here[0].at): (size, a, b)}
    n, groups, sizes = len(slots_here), slots_here[0].groups, slots_here[0].sizes
    if len(b) != groups * sum(sizes) or b.shape[1] != size.rank or len(a) != size.rank:
        raise UserError(
            f"{where} has shapes {tuple(a.shape)} and {tuple(b.shape)}; this base and a rank of {size.rank} need "
            f"{(size.rank, a.shape[1])} and {(groups * sum(sizes), size.rank)}."
        )
    rows = b.unflatten(0, (groups, -1)).split(sizes, 1)  # of each part [groups,rows,r]
    if size.rank % n == 0:
        blocks = [part.unflatten(-1, (n, -1)) for part in rows]  # [groups,rows,n,r/n]
        if all(not blocks[i][:, :, j].any() for i in range(n) for j in range(n) if i != j):
            share = Size(size.rank // n, size.alpha / (math.sqrt(n) if size.rslora else n), size.rslora)
            each = a.unflatten(0, (n, -1))
            return {
                (s.ours, s.at): (share, each[s.pick], blocks[s.pick][:, :, s.pick].flatten(0, 1)) for s in slots_here
            }
    return {(s.ours, s.at): (size, a, rows[s.pick].flatten(0, 1)) for s in slots_here}


def _size(config: Mapping[str, Any], module: str) -> Size:
    rank = _by_pattern(config.get("rank_pattern"), module, config["r"])
    alpha = _by_pattern(config.get("alpha_pattern"), module, config["lora_alpha"])
    return Size(rank, alpha, bool(config.get("use_rslora")))


def _by_pattern(patterns: Mapping[str, Any] | None, module: str, otherwise: Any) -> Any:
    """PEFT's rule: a pattern is a regular expression for the end of a module's name."""
    return next((v for key, v in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", module)), otherwise)


def _asked_for(config: Mapping[str, Any], module: str) -> bool:
    targets = config.get("target_modules") or ()
    if any(config.get(key) is not None for key in ("layers_to_transform", "exclude_modules")):
        return False  # then only the tensors say
    if isinstance(targets, str):
        return re.fullmatch(targets, module) is not None
    return any(_matches(module, target) for target in targets)


def _check_config(path: Path, config: Mapping[str, Any]) -> None:
    """Every key is read, harmless, or at the value at which it does nothing."""
    if config.get("peft_type") != "LORA":
        raise UserError(f"{path}: peft_type is {config.get('peft_type')!r}; only 'LORA' is computed.")
    for key, value in config.items():
        neutral = value in NEUTRAL.get(key, ()) or not value
        if key not in READ and key not in HARMLESS and not neutral:
            raise UserError(
                f"{path}: {key} = {json.dumps(value)} would change the maths and is not computed; merge the adapter "
                "with peft's merge_and_unload and load the result."
            )
    for key in ("r", "lora_alpha"):
        if not isinstance(config.get(key), int | float):
            raise UserError(f"{path}: {key!r} should be a number, not {config.get(key)!r}.")


def _read_tensors(path: Path) -> tuple[dict[str, Tensor], str | None]:
    """The tensors, and on which weights they were trained, if it says so."""
    if not path.is_file():
        raise UserError(f"{path.parent} has an {CONFIG} but no {WEIGHTS}.")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, (file.metadata() or {}).get("base")  # noqa: SIM118
    except (SafetensorError, OSError) as e:
        raise UserError(f"{path} is damaged or not a safetensors file: {e}.") from None
