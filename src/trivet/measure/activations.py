"""What one layer holds, in bytes a token, as arithmetic over its spec: a row a kind of mixer and ffn. No torch.

    KEPT    what autograd keeps from the forward for the backward pass, the part's own input included
    BUSY    gradients that are in the works at once while the backward pass is inside
    LIVE    what lives at once where there is no backward pass

Counted from the code of each part, tensor by tensor, in the order of its forward pass; the tests hold KEPT against
autograd's own saved tensors. `memory.py` adds layers up to a step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from pydantic import Field

from trivet.spec import GQA, MLA, Frozen, GatedDeltaNet, Lightning, MoE, SwiGLU

FP32 = 4
CHUNK, DELTA_CHUNK = 128, 32  # tokens of a chunk of lightning attention, of the delta rule (model/linear.py, delta.py)
MOST_SCORES, LONGEST = 2**24, 2048  # up to which attention on a CPU in bf16 keeps its scores (model/attention.py)
GROUP = 16  # tokens that an expert's group is filled up to, on a CPU in bf16 (model/ffn.py)


class Setting(Frozen):
    """How a step is made; the names are those of `[train]`. rows: of one device's microbatch, a document each."""

    rows: int = Field(default=1, gt=0)
    length: int = Field(default=4096, gt=0)
    precision: Literal["fp32", "bf16"] = "bf16"
    recompute: bool = False
    offload: Literal["none", "optimizer", "gradients"] = "none"
    accumulate: int = Field(default=1, gt=0)
    shards: int = Field(default=1, gt=0)
    expert_shards: int = Field(default=1, gt=0)
    cpu: bool = False  # whose norms and short attention keep more than a GPU's fused kernels

    @property
    def leaves(self) -> bool:
        """Whether the optimizer is in another memory than the model."""
        return self.offload != "none" and not self.cpu

    @property
    def tokens(self) -> int:
        return self.rows * self.length

    @property
    def wide(self) -> int:
        """Bytes of a number that a product made."""
        return 2 if self.precision == "bf16" else FP32


# ------------------------------------------------------------------------------- kept for the backward pass
def norm_kept(width: int, s: Setting, scales: int = 1) -> int:
    """Bytes a token of an RMSNorm's input and scales, in fp32 whatever comes in: autocast wants it so, centred norms too.

    On a CPU it is plain operations, which keep x / rms as well.
    """
    return FP32 * (width * (2 if s.cpu else 1) + scales)


def plain(heads: int, s: Setting) -> bool:
    """Whether attention is plain products that keep their scores: on a CPU in bf16, where rows are short."""
    return s.cpu and s.wide == 2 and s.length <= LONGEST and s.rows * heads * s.length**2 <= MOST_SCORES


def _softmax_kept(heads: int, kv_heads: int, keys: int, values: int, s: Setting) -> int:
    """Softmax attention of heads that are `keys` and `values` wide."""
    if plain(heads, s) or values > keys:  # no fused kernel has values wider than keys
        return s.wide * (heads + kv_heads) * (keys + values) + s.wide * heads * s.length
    filled = heads * values if values < keys else 0  # values are filled up to the keys' width, and cut again
    return s.wide * (2 * (heads + kv_heads) * keys + filled) + FP32 * heads


def _rotated(dims: int, s: Setting) -> int:
    """Cosines and sines in the products' type, once for queries and once for keys; in fp32 all layers share them."""
    return 4 * dims if s.wide == 2 else 0


def _read_by(linears: int, d: int, s: Setting) -> int:
    """The input of so many linear layers: autocast makes a copy for each, else they share it."""
    return d * s.wide * (linears if s.wide == 2 else 1)


def _gqa_kept(m: GQA, d: int, s: Setting) -> int:
    q, kv = m.heads * m.head_dim, m.kv_heads * m.head_dim
    norms = norm_kept(q + kv, s, m.heads + m.kv_heads if m.qk_norm_over == "head" else 2) if m.qk_norm else 0
    gate = 2 * s.wide * q if m.out_gate else 0  # its sigmoid, and the product that o_proj reads
    if m.chunks is None:
        core = _softmax_kept(m.heads, m.kv_heads, m.head_dim, m.head_dim, s) + _rotated(m.rope.dims, s)
    else:
        core = _by_pairs_kept(m, s) + 2 * _rotated(m.rope.dims, s)  # three turns of queries, one of keys
    return _read_by(4 if m.out_gate else 3, d, s) + norms + core + gate


def _by_pairs_kept(m: GQA, s: Setting) -> int:
    """Dual chunks where positions are given: all pairs of tokens. Queries in three forms, weights, three masks."""
    weights = s.wide if s.cpu or s.wide == FP32 else s.wide + FP32  # CUDA's autocast has softmax in fp32
    scale = s.wide if m.chunks is not None and m.chunks.original_length is not None else 0
    tensors = (
        s.wide * m.head_dim * (3 * m.heads + 2 * m.kv_heads + m.heads)
    )  # queries, keys and values, what o_proj reads
    return tensors + s.length * (weights * m.heads + 3) + scale


def _mla_kept(m: MLA, d: int, s: Setting) -> int:
    total = _read_by(2, d, s) + _rotated(m.rope.dims, s)
    if m.q_rank is not None:
        total += norm_kept(m.q_rank, s) + m.q_rank * s.wide
    beside = s.wide if s.wide == FP32 else 0  # the rotated key lies in the same tensor as the latent
    total += norm_kept(m.kv_rank, s) + m.rope.dims * beside
    total += s.wide * (m.kv_rank + m.rope.dims)  # what keys and values are made of
    if m.v_dim == m.qk_dim and not plain(m.heads, s):
        total += s.wide * m.heads * m.nope_dim  # values stay a part of the product that made them
    return total + _softmax_kept(m.heads, m.heads, m.qk_dim, m.v_dim, s)


def _lightning_kept(m: Lightning, d: int, s: Setting) -> int:
    """A token's share. The chunks are fp32: copies of q, k, v for two products each, and what decays and masks."""
    width, sizes = m.heads * m.head_dim, [min(CHUNK, s.length - at) for at in range(0, s.length, CHUNK)]
    products = width * (3 + 1 + 1) * s.wide  # before silu, the gate, what o_proj reads
    normed = norm_kept(width, s) + width * FP32
    chunks = FP32 * (6 * width - width * sizes[0] / s.length + 2 * m.heads)
    pairs = sum(n * n for n in sizes) / s.length * (FP32 * m.heads * (1 + 1 / s.rows) + 1)  # weights, decay, mask
    states = FP32 * m.heads * m.head_dim**2 * len(sizes) / s.length
    return round(_read_by(4, d, s) + products + normed + chunks + pairs + states)


def _delta_kept(m: GatedDeltaNet, d: int, s: Setting) -> int:
    """A token's share. All in fp32 but the gate; the last chunk is filled up. Per pair of tokens in a chunk five tensors."""
    keys, values, size = m.heads * m.key_dim, m.heads * m.value_dim, min(DELTA_CHUNK, s.length)
    chunks = -(-s.length // size)
    filled = chunks * size / s.length
    conv = FP32 * m.conv_width * (m.conv - 1) / s.length + (m.conv + 2) * FP32 * m.conv_width + m.conv  # a mask a shift
    rates = FP32 * (2 * m.key_heads + 3 * m.heads)  # lengths of q and k, decay, beta
    pairs = size * (FP32 * 5 * m.heads + 1)  # decay, k k^T and q k^T with and without it, documents
    inside = FP32 * (6 * keys + 3 * values + 5 * m.heads) + 2  # k thrice, q twice, of the triangular system, v, u
    states = FP32 * m.heads * m.key_dim * m.value_dim * chunks / s.length
    out = norm_kept(values, s, m.heads) + FP32 * values * (filled - 1) + values * (FP32 + 3 * s.wide)
    return round(_read_by(6, d, s) + conv + rates + filled * (pairs + inside) + states + out)


def _dense_kept(f: SwiGLU, d: int, s: Setting) -> int:
    return _read_by(1, d, s) + s.wide * 4 * f.hidden  # gate and up, silu(gate), their product


def _moe_kept(f: MoE, d: int, s: Setting) -> int:
    """Sorted by expert: k rows a token, what they become, where each goes; scores and choices; the shared expert."""
    pairs = f.top_k + (f.experts * (GROUP - 1) / 2 / s.tokens if s.cpu and s.wide == 2 else 0)
    total = pairs * (s.wide * (d + 4 * f.hidden) + 8) + f.top_k * (s.wide * d + 8)
    total += FP32 * d + FP32 * f.experts + f.top_k * (8 + 2 * FP32)  # x for the router, scores, choices, gates
    if f.shared_hidden:
        total += s.wide * (4 * f.shared_hidden + (d if s.wide == 2 else 0))
    if f.shared_gate:
        total += s.wide * d * (2 if s.wide == 2 else 1)
    return round(total)


KEPT: dict[str, Callable[..., int]] = {  # bytes a token that autograd keeps, its own input included
    "gqa": _gqa_kept, "mla": _mla_kept, "lightning": _lightning_kept, "delta": _delta_kept,
    "swiglu": _dense_kept, "moe": _moe_kept,
}  # fmt: skip


# ------------------------------------------------------------------------------------------- live at once
BUSY: dict[str, Callable[..., int]] = {
    "gqa": lambda m, d, s: s.wide * 4 * m.heads * m.head_dim,
    "mla": lambda m, d, s: s.wide * 5 * m.heads * m.qk_dim,
    "lightning": lambda m, d, s: FP32 * 6 * m.heads * m.head_dim,
    "delta": lambda m, d, s: FP32 * m.heads * (3 * m.key_dim + 2 * m.value_dim + 2 * min(DELTA_CHUNK, s.length)),
    "swiglu": lambda f, d, s: s.wide * 3 * f.hidden,
    "moe": lambda f, d, s: s.wide * f.top_k * (3 * f.hidden + d),
}


def _gqa_live(m: GQA, s: Setting) -> int:
    if m.chunks is not None:  # three scores of every pair, the one that counts, that masked; how many chunks apart
        return _by_pairs_kept(m, s) + s.length * (s.wide * 5 * m.heads + 8)
    return _softmax_kept(m.heads, m.kv_heads, m.head_dim, m.head_dim, s)


def _delta_live(m: GatedDeltaNet, s: Setting) -> int:
    """Names hold what they hold until the last chunk is done."""
    inside = 9 * m.key_dim + 6 * m.value_dim + 4 * min(DELTA_CHUNK, s.length)
    return FP32 * (2 * m.conv_width + m.heads * inside)


LIVE: dict[str, Callable[..., int]] = KEPT | {  # bytes a token that live at once without a backward pass
    "gqa": lambda m, d, s: s.wide * d + _gqa_live(m, s),
    "delta": lambda m, d, s: s.wide * d + _delta_live(m, s),
    "lightning": lambda m, d, s: s.wide * d + 7 * FP32 * m.heads * m.head_dim,  # one chunk after the other
    "moe": lambda f, d, s: _moe_kept(f.model_copy(update={"shared_hidden": 0, "shared_gate": False}), d, s),
}
