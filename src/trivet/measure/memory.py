"""What one device holds during a step of `trivet train`, as arithmetic over the spec. No torch.

    weights, gradients   4 bytes a number (products may be bf16, the numbers stay fp32)
    optimizer            Muon: one moment of every matrix; AdamW: two of the rest
    activations          what autograd keeps from the forward for the backward pass, counted from the code of
                         each mixer and ffn (KEPT); the tests hold it against autograd's own saved tensors

Three moments compete for the peak (`Moments`): the end of the forward pass, when the loss makes the head's
gradient; the backward pass, which frees a layer's activations and makes its gradients; the update, in which
Muon works on one stack of equal shapes after the other, and AdamW holds a copy of what it trains.

FSDP (arXiv 2304.11277) divides weights, gradients and optimizer by `shards`, and gathers two layers at a
time; expert parallelism divides the experts further, by `expert_shards`, so that a model stands on
shards x expert_shards devices, each with rows of its own. Left out: buffers of communication, fragmentation,
experts that are chosen more often than others, and on CUDA the workspaces of libraries.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from pydantic import Field

from trivet.config import UserError
from trivet.spec import GQA, MLA, DualResidual, Frozen, GatedDeltaNet, LayerSpec, Lightning, ModelSpec, MoE, SwiGLU

FP32 = 4
CHUNK, DELTA_CHUNK = 128, 32  # tokens of a chunk of lightning attention, of the delta rule (model/linear.py, delta.py)
STACK = {"cpu": 2**22, "cuda": 2**24}  # numbers that Muon works on at a time, or one matrix (train/optim.py)
LOGITS = 2**22  # numbers in one chunk of logits (train/losses.py)
MOST_SCORES, LONGEST = 2**24, 2048  # up to which attention on a CPU in bf16 keeps its scores (model/attention.py)
GROUP = 16  # tokens that an expert's group is filled up to, on a CPU in bf16 (model/ffn.py)


class Setting(Frozen):
    """How a step is made; the names are those of `[train]`. rows: of one device's microbatch, a document each."""

    rows: int = Field(default=1, gt=0)
    length: int = Field(default=4096, gt=0)
    precision: Literal["fp32", "bf16"] = "bf16"
    recompute: bool = False
    accumulate: int = Field(default=1, gt=0)
    shards: int = Field(default=1, gt=0)
    expert_shards: int = Field(default=1, gt=0)
    cpu: bool = False  # whose norms and short attention keep more than a GPU's fused kernels

    @property
    def tokens(self) -> int:
        return self.rows * self.length

    @property
    def wide(self) -> int:
        """Bytes of a number that a product made."""
        return 2 if self.precision == "bf16" else FP32


class Moments(NamedTuple):
    """Bytes that live at the worst of each part of a step."""

    forward: int
    backward: int
    update: int


class Training(NamedTuple):
    """Bytes of one device. `activations` at the end of the forward pass, with what the loss keeps."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    moments: Moments

    @property
    def peak(self) -> int:
        return max(self.moments)

    def row(self) -> dict[str, Any]:
        said = self._asdict() | {"moments": self.moments._asdict(), "peak": self.peak}
        return said | {"peak_in": max(self.moments._fields, key=lambda name: said["moments"][name])}


# ------------------------------------------------------------------------------------------- weights
class Matrix(NamedTuple):
    """`copies` weights of the same shape that Muon trains; a routed expert's are divided by expert shards."""

    copies: int
    rows: int
    columns: int
    routed: bool = False

    @property
    def numbers(self) -> int:
        return self.copies * self.rows * self.columns


def _gqa_matrices(m: GQA, d: int) -> list[Matrix]:
    q, kv = m.heads * m.head_dim, m.kv_heads * m.head_dim
    return [Matrix(2 if m.out_gate else 1, q, d), Matrix(2, kv, d), Matrix(1, d, q)]


def _mla_matrices(m: MLA, d: int) -> list[Matrix]:
    q = m.heads * m.qk_dim
    queries = [Matrix(1, q, d)] if m.q_rank is None else [Matrix(1, m.q_rank, d), Matrix(1, q, m.q_rank)]
    down = Matrix(1, m.kv_rank + m.rope.dims, d)
    return [*queries, down, Matrix(1, m.heads * (m.nope_dim + m.v_dim), m.kv_rank), Matrix(1, d, m.heads * m.v_dim)]


def _lightning_matrices(m: Lightning, d: int) -> list[Matrix]:
    return [Matrix(4, m.heads * m.head_dim, d), Matrix(1, d, m.heads * m.head_dim)]


def _delta_matrices(m: GatedDeltaNet, d: int) -> list[Matrix]:
    values = m.heads * m.value_dim
    inputs = [
        Matrix(2, m.key_heads * m.key_dim, d),
        Matrix(2, values, d),
        Matrix(2, m.heads, d),
    ]  # qk, v and gate, rates
    return [*inputs, Matrix(1, d, values)]


def _dense_matrices(f: SwiGLU, d: int) -> list[Matrix]:
    return [Matrix(2, f.hidden, d), Matrix(1, d, f.hidden)]


def _moe_matrices(f: MoE, d: int) -> list[Matrix]:
    shared = _dense_matrices(SwiGLU(hidden=f.shared_hidden), d) if f.shared_hidden else []
    return [Matrix(3 * f.experts, f.hidden, d, routed=True), *shared]


MATRICES: dict[str, Callable[..., list[Matrix]]] = {
    "gqa": _gqa_matrices, "mla": _mla_matrices, "lightning": _lightning_matrices, "delta": _delta_matrices,
    "swiglu": _dense_matrices, "moe": _moe_matrices,
}  # fmt: skip


def matrices(layer: LayerSpec, d: int) -> list[Matrix]:
    return [*MATRICES[layer.mixer.kind](layer.mixer, d), *MATRICES[layer.ffn.kind](layer.ffn, d)]


def modules(spec: ModelSpec) -> list[LayerSpec]:
    """Every layer, those of the prediction modules last."""
    return [*spec.layers, *[spec.layers[-1]] * spec.mtp]


def _held(spec: ModelSpec, s: Setting) -> tuple[float, list[Matrix]]:
    """Numbers that one device trains: of all kinds, and of matrices as Muon meets them."""
    d = spec.d_model
    found = [m for layer in modules(spec) for m in matrices(layer, d)] + [Matrix(spec.mtp, d, 2 * d)]
    bias = sum(layer.ffn.experts for layer in modules(spec) if isinstance(layer.ffn, MoE) and layer.ffn.selection_bias)
    routed = sum(m.numbers for m in found if m.routed)
    total = spec.num_params() - bias - routed + routed / s.expert_shards
    mine = [m._replace(copies=m.copies // (s.expert_shards if m.routed else 1)) for m in found]
    return total / s.shards, mine


# --------------------------------------------------------------------------------------- activations
def _norm(width: int, s: Setting, scales: int = 1) -> int:
    """Bytes a token of an RMSNorm's input and scales, in fp32 whatever comes in: autocast wants it so, centred norms too.

    On a CPU it is plain operations, which keep x / rms as well.
    """
    return FP32 * (width * (2 if s.cpu else 1) + scales)


def _plain(heads: int, s: Setting) -> bool:
    """Whether attention is plain products that keep their scores: on a CPU in bf16, where rows are short."""
    return s.cpu and s.wide == 2 and s.length <= LONGEST and s.rows * heads * s.length**2 <= MOST_SCORES


def _softmax_kept(heads: int, kv_heads: int, keys: int, values: int, s: Setting) -> int:
    """Softmax attention of heads that are `keys` and `values` wide."""
    if _plain(heads, s) or values > keys:  # no fused kernel has values wider than keys
        return s.wide * (heads + kv_heads) * (keys + values) + s.wide * heads * s.length
    filled = heads * values if values < keys else 0  # values are filled up to the keys' width, and cut again
    return s.wide * (2 * (heads + kv_heads) * keys + filled) + FP32 * heads


def _masks(spec: ModelSpec, s: Setting) -> int:
    """Bytes of what fused attention adds to scores: one tensor a window for all layers, another for prediction modules."""
    total = 0
    for layers in (spec.layers, spec.layers[-1:] if spec.mtp else ()):
        mixers = [layer.mixer for layer in layers]
        windows = {m.window for m in mixers if isinstance(m, GQA) and m.chunks is None and not _plain(m.heads, s)}
        if any(isinstance(m, MLA) and m.v_dim <= m.qk_dim and not _plain(m.heads, s) for m in mixers):
            windows.add(None)
        total += len(windows)
    return total * s.tokens * s.length * s.wide


def _rotated(dims: int, s: Setting) -> int:
    """Cosines and sines in the products' type, once for queries and once for keys; in fp32 all layers share them."""
    return 4 * dims if s.wide == 2 else 0


def _read_by(linears: int, d: int, s: Setting) -> int:
    """The input of so many linear layers: autocast makes a copy for each, else they share it."""
    return d * s.wide * (linears if s.wide == 2 else 1)


def _gqa_kept(m: GQA, d: int, s: Setting) -> int:
    q, kv = m.heads * m.head_dim, m.kv_heads * m.head_dim
    norms = _norm(q + kv, s, m.heads + m.kv_heads if m.qk_norm_over == "head" else 2) if m.qk_norm else 0
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
        total += _norm(m.q_rank, s) + m.q_rank * s.wide
    beside = s.wide if s.wide == FP32 else 0  # the rotated key lies in the same tensor as the latent
    total += _norm(m.kv_rank, s) + m.rope.dims * beside
    total += s.wide * (m.kv_rank + m.rope.dims)  # what keys and values are made of
    if m.v_dim == m.qk_dim and not _plain(m.heads, s):
        total += s.wide * m.heads * m.nope_dim  # values stay a part of the product that made them
    return total + _softmax_kept(m.heads, m.heads, m.qk_dim, m.v_dim, s)


def _lightning_kept(m: Lightning, d: int, s: Setting) -> int:
    """A token's share. The chunks are fp32: copies of q, k, v for two products each, and what decays and masks."""
    width, sizes = m.heads * m.head_dim, [min(CHUNK, s.length - at) for at in range(0, s.length, CHUNK)]
    products = width * (3 + 1 + 1) * s.wide  # before silu, the gate, what o_proj reads
    normed = _norm(width, s) + width * FP32
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
    out = _norm(values, s, m.heads) + FP32 * values * (filled - 1) + values * (FP32 + 3 * s.wide)
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


def layer_kept(layer: LayerSpec, d: int, s: Setting) -> int:
    """Bytes that one layer keeps, the stream that enters each of its two norms included."""
    parts = KEPT[layer.mixer.kind](layer.mixer, d, s) + KEPT[layer.ffn.kind](layer.ffn, d, s)
    return s.tokens * (2 * _norm(d, s) + parts)


def cast_bytes(layer: LayerSpec, d: int, s: Setting) -> int:
    """bf16 copies of a layer's matrices, which autograd keeps too; FSDP gathers them again instead."""
    if s.shards > 1:
        return 0
    here = sum(m.numbers // (s.expert_shards if m.routed else 1) for m in matrices(layer, d))
    return s.wide * here if s.wide < FP32 else 0


def forward_kept(spec: ModelSpec, s: Setting) -> int:
    """Bytes that a forward pass leaves for the backward pass: layers, norms, prediction modules, not yet the loss."""
    d, n = spec.d_model, s.tokens
    dual = isinstance(spec.layers[0].residual, DualResidual)
    stream = n * d * FP32 * (2 if dual else 1)
    total = n * (8 + _norm(d, s))  # ids of tokens, final norm
    for layer in modules(spec):
        total += stream if s.recompute else layer_kept(layer, d, s) + cast_bytes(layer, d, s)
    mixers = [layer.mixer for layer in spec.layers]
    ropes = {(m.rope, m.chunks if isinstance(m, GQA) else None) for m in mixers if isinstance(m, GQA | MLA)}
    turns = sum(FP32 * rope.dims * (1 if chunks is None else 3) for rope, chunks in ropes)
    total += n * turns if s.wide == FP32 else 0
    total += spec.mtp * n * (3 * _norm(d, s) + 2 * d * s.wide)
    return total + (0 if s.recompute else _masks(spec, s))


# ----------------------------------------------------------------------------------------- a whole step
def training_memory(spec: ModelSpec, s: Setting) -> Training:
    """What one device holds. Raises UserError for expert shards that can't be."""
    check_shards(spec, s)
    numbers, found = _held(spec, s)
    matrix = sum(m.numbers for m in found) / s.shards
    weights = gradients = FP32 * numbers
    optimizer = FP32 * (matrix + 2 * (numbers - matrix))
    table, kept = spec.vocab_size * spec.d_model, forward_kept(spec, s)
    head = (1 + spec.mtp) * s.wide * (s.tokens * spec.d_model + table)  # the gradients that the losses keep
    loss = _loss(spec, s)
    still = weights + optimizer + (gradients if s.accumulate > 1 else 0)
    still += _masks(spec, s) if s.recompute else 0  # held until layers are computed again
    moments = Moments(
        round(still + kept + head + loss),
        round(still + _backward(spec, s, kept, head)),
        round(weights + gradients + optimizer + FP32 * max(_muon(found, s), numbers - matrix)),
    )
    return Training(round(weights), round(gradients), round(optimizer), round(kept + head), moments)


def _loss(spec: ModelSpec, s: Setting) -> int:
    """Bytes of the head's loss while it walks over the logits, one chunk after the other."""
    table, at_once = spec.vocab_size * spec.d_model, max(spec.d_model, LOGITS // spec.vocab_size)
    chunk = min(s.tokens, at_once) * spec.vocab_size
    cast = 0 if s.wide == FP32 else s.wide  # of logits' gradients, and of the head
    logits = max(2 * FP32 * chunk, (FP32 + cast) * chunk + s.wide * table)
    return logits + (0 if s.wide == FP32 else (FP32 + s.wide) * table)  # the head cast, its gradient in fp32


def serving_bytes(spec: ModelSpec, s: Setting) -> int:
    """What serving `rows` sequences holds while it reads their prompts: weights and caches of one type, fp32 states.

    The widest part works while the stream is there three times: at first, before the layer and inside it.
    """
    d, caches = spec.d_model, spec.cache_bytes_per_token(s.wide) * s.length + spec.state_bytes(FP32)
    windows, widest = set[int | None](), 0
    for layer in spec.layers:
        if not isinstance(layer.mixer, Lightning | GatedDeltaNet):
            windows.add(layer.mixer.window if isinstance(layer.mixer, GQA) else None)  # whose mask stays from here on
        live = max(LIVE[part.kind](part, d, s) for part in (layer.mixer, layer.ffn))
        widest = max(widest, live + len(windows) * s.wide * s.length)
    return s.wide * spec.num_params() + s.rows * caches + s.tokens * (3 * s.wide * d + widest)


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


def check_shards(spec: ModelSpec, s: Setting) -> None:
    """Raises UserError where experts can't be divided as asked."""
    if s.expert_shards == 1:
        return
    counts = {layer.ffn.experts for layer in modules(spec) if isinstance(layer.ffn, MoE)}
    if not counts:
        raise UserError(f"--expert-shards {s.expert_shards} needs experts, and this model has none; leave it out.")
    for experts in sorted(counts):
        if experts % s.expert_shards:
            fit = [n for n in range(2, experts + 1) if experts % n == 0]
            raise UserError(
                f"--expert-shards {s.expert_shards} does not divide {experts} experts; take one of {', '.join(map(str, fit))}."
            )


def _backward(spec: ModelSpec, s: Setting, kept: float, head: int) -> float:
    """The most that activations and gradients take together, while layer by layer one becomes the other."""
    d = spec.d_model
    fresh = 0 if s.accumulate > 1 else FP32 / s.shards  # bytes of a new gradient's number
    done = fresh * spec.vocab_size * d
    worst = kept + head + s.wide * spec.vocab_size * d
    for layer in reversed(modules(spec)):
        inside = layer_kept(layer, d, s) + cast_bytes(layer, d, s)
        again = inside if s.recompute else 0
        gathered = 0.0
        mine = sum(m.numbers / (s.expert_shards if m.routed else 1) for m in matrices(layer, d))
        if s.shards > 1:  # this layer's and the next one's weights, and this one's whole gradient
            gathered = mine * (2 * s.wide + FP32)
        worst = max(worst, kept + done + again + gathered + s.tokens * _busy(layer, d, s))
        kept -= s.tokens * d * FP32 if s.recompute else inside
        done += fresh * mine
    return max(worst, done)


def _busy(layer: LayerSpec, d: int, s: Setting) -> float:
    """Bytes a token of gradients that are in the works at once inside one layer: of its stream, and of its widest part."""
    return 2 * FP32 * d + max(BUSY[part.kind](part, d, s) for part in (layer.mixer, layer.ffn))


BUSY: dict[str, Callable[..., int]] = {
    "gqa": lambda m, d, s: s.wide * 4 * m.heads * m.head_dim,
    "mla": lambda m, d, s: s.wide * 5 * m.heads * m.qk_dim,
    "lightning": lambda m, d, s: FP32 * 6 * m.heads * m.head_dim,
    "delta": lambda m, d, s: FP32 * m.heads * (3 * m.key_dim + 2 * m.value_dim + 2 * min(DELTA_CHUNK, s.length)),
    "swiglu": lambda f, d, s: s.wide * 3 * f.hidden,
    "moe": lambda f, d, s: s.wide * f.top_k * (3 * f.hidden + d),
}


def _muon(found: list[Matrix], s: Setting) -> int:
    """Numbers that Muon holds beside its moments: a stack of one shape, its step ahead and its orthogonal form."""
    shapes: dict[tuple[int, int], int] = {}
    for m in found:
        shape = (min(m.rows, m.columns), max(m.rows, m.columns))
        shapes[shape] = shapes.get(shape, 0) + m.copies
    worst, most = 0, STACK["cpu" if s.cpu else "cuda"]
    for (short, long), copies in shapes.items():
        count = min(copies, max(1, most // (short * long)))
        numbers, gram = count * short * long, count * short**2
        inside = 2 * (numbers + gram) if s.cpu else numbers + numbers // 2 + gram  # on a GPU it iterates in bf16
        worst = max(worst, numbers + max(inside, 2 * numbers))  # at last those that were turned, back in a copy
    return worst
