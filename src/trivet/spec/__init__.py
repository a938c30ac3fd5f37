"""What a model is, as data: every layer names its mixer, its ffn and its residual style.

A `ModelSpec` is enough to build a `Transformer` and enough to price one: parameters, active
parameters, FLOPs and cache bytes are arithmetic on the spec, and the tests hold that arithmetic
against the tensors. No torch here, so planning costs nothing.

Depth is a pattern string. Each layer is `mixer/ffn` or `mixer/ffn/residual`, names pointing into
the spec's tables, with repetition and groups:

    "gqa/dense*28"                         Qwen3-0.6B
    "mla/dense*3 mla/moe*58"               DeepSeek-V3
    "(lightning/moe*7 gqa/moe)*10"         MiniMax-M1
    "(delta/moe*3 gqa/moe)*12"             Qwen3-Next-80B-A3B

Left out: anything that is not the model's identity (dtype, device, kernels, dropout).
"""

from __future__ import annotations

from trivet.spec.extend import with_chunks, with_yarn
from trivet.spec.ffns import FFN, MoE, SwiGLU
from trivet.spec.frozen import Free, Frozen
from trivet.spec.mixers import GQA, MLA, GatedDeltaNet, Lightning, Mixer
from trivet.spec.model import DualResidual, LayerSpec, ModelSpec, PostNorm, PreNorm, Residual
from trivet.spec.pattern import expand_pattern, write_pattern
from trivet.spec.positions import DualChunks, Llama3Scaling, Rope, Yarn

__all__ = [
    "FFN",
    "GQA",
    "MLA",
    "DualChunks",
    "DualResidual",
    "Free",
    "Frozen",
    "GatedDeltaNet",
    "LayerSpec",
    "Lightning",
    "Llama3Scaling",
    "Mixer",
    "MoE",
    "ModelSpec",
    "PostNorm",
    "PreNorm",
    "Residual",
    "Rope",
    "SwiGLU",
    "Yarn",
    "expand_pattern",
    "with_chunks",
    "with_yarn",
    "write_pattern",
]
