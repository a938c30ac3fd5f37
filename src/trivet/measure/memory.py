"""What one device holds during a step of `trivet train`, as arithmetic over the spec. No torch.

    weights, gradients   4 bytes a number (products may be bf16, the numbers stay fp32)
    optimizer            Muon: one moment of every matrix; AdamW: two of the rest
    activations          what autograd keeps from the forward for the backward pass, counted from the code of
                         each mixer and ffn (`activations.py`)

With `offload` the optimizer is in host memory, with the weights that it steps and their gradients (`Training.host`). On
the device gradients are then there until the update, or only while a layer makes them. On a CPU both are one memory.

Three moments compete for the peak (`Moments`): the end of the forward pass, when the loss makes the head's
gradient; the backward pass, which frees a layer's activations and makes its gradients; the update, in which
Muon works on one stack of equal shapes after the other, and AdamW holds a copy of what it trains.

What RL holds is `memory_rl.py`.

FSDP (arXiv 2304.11277) divides weights, gradients and optimizer by `shards`, and gathers two layers at a
time, embedding and head for the whole step; expert parallelism divides the experts further, by `expert_shards`,
so that a model stands on shards x expert_shards devices, each with rows of its own. What is gathered is fp32;
in bf16 autograd keeps the cast copies of all layers, as on one device, unless they are recomputed.
Left out: buffers of communication, fragmentation, experts that are chosen more often than others, and on CUDA the workspaces of libraries.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from trivet.config import UserError
from trivet.measure.activations import BUSY, FP32, KEPT, LIVE, Setting, norm_kept, plain
from trivet.spec import GQA, MLA, DualResidual, GatedDeltaNet, LayerSpec, Lightning, ModelSpec, MoE, SwiGLU

STACK = {"cpu": 2**22, "cuda": 2**24}  # numbers that Muon works on at a time, or one matrix (train/optim.py)
LOGITS = 2**22  # numbers in one chunk of logits (train/losses.py)


class Moments(NamedTuple):
    """Bytes that live at the worst of each part of a step."""

    forward: int
    backward: int
    update: int


class Training(NamedTuple):
    """Bytes of one device, and those in host memory. `activations` at the end of the forward pass, with what the loss keeps."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    host: int
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


def held(spec: ModelSpec, s: Setting) -> tuple[float, list[Matrix]]:
    """Numbers that one device trains: of all kinds, and of matrices as Muon meets them."""
    d = spec.d_model
    found = [m for layer in modules(spec) for m in matrices(layer, d)] + [Matrix(spec.mtp, d, 2 * d)]
    bias = sum(layer.ffn.experts for layer in modules(spec) if isinstance(layer.ffn, MoE) and layer.ffn.selection_bias)
    routed = sum(m.numbers for m in found if m.routed)
    total = spec.num_params() - bias - routed + routed / s.expert_shards
    mine = [m._replace(copies=m.copies // (s.expert_shards if m.routed else 1)) for m in found]
    return total / s.shards, mine


# --------------------------------------------------------------------------------------- activations
def _masks(spec: ModelSpec, s: Setting) -> int:
    """Bytes of what fused attention adds to scores: one tensor a window for all layers, another for prediction modules."""
    total = 0
    for layers in (spec.layers, spec.layers[-1:] if spec.mtp else ()):
        mixers = [layer.mixer for layer in layers]
        windows = {m.window for m in mixers if isinstance(m, GQA) and m.chunks is None and not plain(m.heads, s)}
        if any(isinstance(m, MLA) and m.v_dim <= m.qk_dim and not plain(m.heads, s) for m in mixers):
            windows.add(None)
        total += len(windows)
    return 0 if s.strands > 1 else total * s.tokens * s.length * s.wide


def layer_kept(layer: LayerSpec, d: int, s: Setting) -> int:
    """Bytes that one layer keeps, the stream that enters each of its two norms included."""
    parts = KEPT[layer.mixer.kind](layer.mixer, d, s) + KEPT[layer.ffn.kind](layer.ffn, d, s)
    return s.tokens * (2 * norm_kept(d, s) + parts)


def cast_bytes(layer: LayerSpec, d: int, s: Setting) -> int:
    """bf16 copies of a layer's matrices, which autograd keeps too."""
    here = sum(m.numbers // (s.expert_shards if m.routed else 1) for m in matrices(layer, d))
    return s.wide * here if s.wide < FP32 else 0


def forward_kept(spec: ModelSpec, s: Setting) -> int:
    """Bytes that a forward pass leaves for the backward pass: layers, norms, prediction modules, not yet the loss."""
    d, n = spec.d_model, s.tokens
    dual = isinstance(spec.layers[0].residual, DualResidual)
    stream = n * d * FP32 * (2 if dual else 1)
    total = n * (8 + norm_kept(d, s))  # ids of tokens, final norm
    for layer in modules(spec):
        total += stream if s.recompute else layer_kept(layer, d, s) + cast_bytes(layer, d, s)
    mixers = [layer.mixer for layer in spec.layers]
    ropes = {(m.rope, m.chunks if isinstance(m, GQA) else None) for m in mixers if isinstance(m, GQA | MLA)}
    turns = sum(FP32 * rope.dims * (1 if chunks is None else 3) for rope, chunks in ropes)
    total += n * turns if s.wide == FP32 else 0
    total += spec.mtp * n * (3 * norm_kept(d, s) + 2 * d * s.wide)
    return total + (0 if s.recompute else _masks(spec, s))


# ----------------------------------------------------------------------------------------- a whole step
def training_memory(spec: ModelSpec, s: Setting) -> Training:
    """What one device holds. Raises UserError for expert shards that can't be."""
    check_shards(spec, s)
    numbers, found = held(spec, s)
    matrix = sum(m.numbers for m in found) / s.shards
    weights = gradients = FP32 * numbers
    optimizer = FP32 * (matrix + 2 * (numbers - matrix))
    copies = 0 if s.offload == "none" else weights
    host = copies and copies + gradients + optimizer
    if s.leaves:
        copies = optimizer = 0
        gradients = gradients if s.offload == "optimizer" else 0
    table, kept = spec.vocab_size * spec.d_model, forward_kept(spec, s)
    head = (1 + spec.mtp) * s.wide * (s.tokens * spec.d_model + table)  # the gradients that the losses keep
    loss, busy = _loss(spec, s), update_bytes(found, 0 if s.leaves else numbers - matrix, s)
    still = weights + copies + optimizer + (gradients if s.accumulate > 1 else 0)
    tables = (1 if spec.tie_embeddings else 2) * table
    still += FP32 * tables if _apart(s) else 0  # gathered
    still += _masks(spec, s) if s.recompute else 0  # held until layers are computed again
    moments = Moments(
        round(still + kept + head + loss),
        round(still + after_backward(spec, s, kept, head)),
        round(weights + busy + (0 if s.leaves else copies + gradients + optimizer)),
    )
    return Training(round(weights), round(gradients), round(optimizer), round(kept + head), round(host), moments)


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


def after_backward(spec: ModelSpec, s: Setting, kept: float, head: int) -> float:
    """The most that activations and gradients take together, while layer by layer one becomes the other."""
    d = spec.d_model
    passing = s.leaves and s.offload == "gradients"
    fresh = 0 if s.accumulate > 1 and not passing else FP32 / s.shards  # bytes of a new gradient's number
    done = fresh * spec.vocab_size * d
    worst = kept + head + s.wide * spec.vocab_size * d
    for layer in reversed(modules(spec)):
        inside = layer_kept(layer, d, s) + cast_bytes(layer, d, s)
        again = inside if s.recompute else 0
        gathered = 0.0
        mine = sum(m.numbers / (s.expert_shards if m.routed else 1) for m in matrices(layer, d))
        if _apart(s):  # this layer's and the next one's weights, this one's whole gradient, and those of the tables
            gathered = FP32 * (3 * mine + (1 if spec.tie_embeddings else 2) * spec.vocab_size * d)
        worst = max(worst, kept + done + again + gathered + s.tokens * _busy(layer, d, s))
        kept -= s.tokens * d * FP32 if s.recompute else inside
        done = fresh * mine + (0 if passing else done)
    return max(worst, done)


def _apart(s: Setting) -> bool:
    """Whether a model is divided, so that its layers are gathered."""
    return s.shards * s.expert_shards > 1


def _busy(layer: LayerSpec, d: int, s: Setting) -> float:
    """Bytes a token of gradients that are in the works at once inside one layer: of its stream, and of its widest part."""
    return 2 * FP32 * d + max(BUSY[part.kind](part, d, s) for part in (layer.mixer, layer.ffn))


def update_bytes(found: list[Matrix], others: float, s: Setting) -> float:
    """Bytes that Muon works with, or AdamW's copy of what it trains, beside the moments."""
    return FP32 * max(_muon(found, s), others)


def _muon(found: list[Matrix], s: Setting) -> int:
    """Numbers that Muon holds beside its moments: a stack of one shape, its step ahead and its orthogonal form."""
    shapes: dict[tuple[int, int], int] = {}
    for m in found:
        shape = (min(m.rows, m.columns), max(m.rows, m.columns))
        shapes[shape] = shapes.get(shape, 0) + m.copies
    worst, most = 0, STACK["cpu" if s.cpu or s.leaves else "cuda"]  # by where the moments are
    for (short, long), copies in shapes.items():
        count = min(copies, max(1, most // (short * long)))
        numbers, gram = count * short * long, count * short**2
        inside = 2 * (numbers + gram) if s.cpu else numbers + numbers // 2 + gram  # on a GPU it iterates in bf16
        worst = max(worst, numbers + max(inside, 2 * numbers))  # at last those that were turned, back in a copy
    return worst
