"""LoRA (arXiv 2106.09685): a frozen matrix W plus a small learned one, W + scale B A.

    A [r,in] uniform in +-1/sqrt(in), B [out,r] zero, so that training starts at the model as it is
    scale = alpha / r, or alpha / sqrt(r) (rsLoRA, arXiv 2312.03732)

A *place* is a matrix that can be adapted: (parameter, leading indices), as in hub/names.py. Places are the
projections of every mixer, and gate, up and down of dense and shared ffns. `layers.Linear` and
`ffn.DenseFFN` compute W x + scale B (A x); the rest of the model does not know. Absorbed MLA, which
never multiplies by W x, adds the matrices first.

Left out: experts (a grouped product has no room for a second factor), routers, embedding and head,
prediction modules, dropout on A's input.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from trivet.model.ffn import DenseFFN
from trivet.model.layers import Adapter, Linear
from trivet.model.transformer import Transformer
from trivet.spec import Frozen

Place = tuple[str, tuple[int, ...]]
PARTS: dict[Place, str] = {("gate_up", (0,)): "gate", ("gate_up", (1,)): "up", ("down", ()): "down"}  # of DenseFFN
SAMPLE = 16  # numbers of each parameter that a fingerprint looks at


class LoRA(Frozen):
    """How to adapt a model instead of changing it."""

    rank: int = Field(default=16, gt=0, description="of each adapter")
    alpha: float = Field(default=32, gt=0, description="the adapter's product counts alpha / rank")
    rslora: bool = Field(default=False, description="alpha / sqrt(rank) instead: larger ranks then learn as fast")
    targets: tuple[str, ...] | None = Field(
        default=None, min_length=1, description="projections by the family's names; unset: all of attention and ffn"
    )


class Size(NamedTuple):
    rank: int
    alpha: float
    rslora: bool


def places(model: Transformer) -> list[Place]:
    """Every matrix that can be adapted, in the order of the layers."""
    found: list[Place] = []
    for name, module in model.layers.named_modules(prefix="layers"):
        if isinstance(module, Linear):
            found.append((f"{name}.weight", ()))
        elif isinstance(module, DenseFFN):
            found += [(f"{name}.{leaf}", at) for leaf, at in PARTS]
    return found


def attach(model: Transformer, sizes: Mapping[Place, Size], seed: int = 0) -> None:
    """Freeze the model and give each place an adapter that does nothing yet."""
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for (name, at), size in sizes.items():
        path, _, leaf = name.rpartition(".")
        adapter = Adapter(*size, model.get_parameter(name)[at])
        bound = adapter.a.shape[1] ** -0.5
        drawn = torch.empty(adapter.a.shape).uniform_(-bound, bound, generator=generator)  # the same on any device
        with torch.no_grad():
            adapter.a.copy_(drawn)
        module = model.get_submodule(path)
        if isinstance(module, Linear):
            module.lora = adapter
        elif isinstance(module, DenseFFN):
            module.lora[PARTS[leaf, at]] = adapter


def adapters(model: Transformer) -> dict[Place, Adapter]:
    """The adapters of a model; none in one that is not adapted."""
    found: dict[Place, Adapter] = {}
    for name, at in places(model):
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        held = dict(module.lora.items()).get(PARTS[leaf, at]) if isinstance(module, DenseFFN) else module.lora
        if isinstance(held, Adapter):
            found[name, at] = held
    return found


def adapter_parameters(model: Transformer) -> dict[str, Tensor]:
    """A and B of every adapter, under the names of `named_parameters`."""
    return {name: p for name, p in model.named_parameters() if ".lora." in name}


@torch.no_grad()
def merge(model: Transformer) -> None:
    """Add every adapter to its matrix, in place, and take the adapters away: an ordinary model again."""
    for (name, at), adapter in adapters(model).items():
        matrix = model.get_parameter(name)[at]
        matrix.copy_(matrix.float() + adapter.scale * adapter.b.float() @ adapter.a.float())
    for module in model.modules():
        if isinstance(module, Linear):
            module.lora = None
        elif isinstance(module, DenseFFN):
            module.lora.clear()
    model.requires_grad_(True)


def fingerprint(model: Transformer) -> str:
    """A hash of the first numbers of every frozen parameter, as bf16: which weights an adapter was trained on.

    Not of all numbers, because that would read a large model once more.
    """
    digest = hashlib.sha256()
    for name, p in model.named_parameters():
        if ".lora." not in name:
            sample = p.detach().reshape(-1)[:SAMPLE].to(torch.bfloat16).float()
            digest.update(name.encode() + sample.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def training_flops_per_token(model: Transformer, length: int) -> int:
    """Forward and backward of one token in rows of `length`: frozen matrices take no gradient of their own."""
    spec, adapted = model.spec, sum(p.numel() for p in adapter_parameters(model).values())
    if not adapted:
        return spec.training_flops_per_token(length)
    d = spec.d_model
    matmuls = sum(layer.mixer.matmul_params(d) + layer.ffn.matmul_params(d) for layer in spec.layers)
    return spec.training_flops_per_token(length) - 2 * (matmuls + spec.vocab_size * d) + 6 * adapted
