"""What one device holds during a step of `trivet rl`, as arithmetic over the spec and `[rl]`. No torch.

Always there: weights, the optimizer's moments (but for `rl.offload` on a GPU), with a KL term the reference. Two things take turns beside them, and
the larger one is the peak:

    sampling   in bf16 a copy of the weights; caches of `rows` episodes of `length` tokens, as long as they may get; the
               logits of a step and what they are turned into before a token is drawn
    update     what a training step of `rl.rows` x `rl.length` holds (`memory.py`), but for the head's loss, which
               gives a number a token and makes its logits a second time, and for prediction modules, which do not run

The episodes of the batch are held all along. How long prompts are is not known: they are taken to fill what
`length` leaves beside `max_tokens`, and episodes to be as long as a row, so this is what a run may need and not what
its first steps take. Left out: a prefix store (256 MB at most, with tools), samplers elsewhere (`rl.workers`,
`rl.server`, `rl.lag`: their memory is not the learner's), what evaluation takes, adapters.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from trivet.measure.activations import FP32, LIVE, Setting
from trivet.measure.memory import LOGITS, Moments, after_backward, forward_kept, held, update_bytes
from trivet.rl.config import RLConfig
from trivet.rl.objectives import find_objective
from trivet.spec import GQA, GatedDeltaNet, Lightning, ModelSpec, MoE

PIECE = 16_384  # tokens of prompts that are computed at a time (engine/filling.py)
SPAN = 16  # slots that a row has beyond what it knows (engine/rows.py)
COLUMNS = 256  # slots of a row to begin with; then they double (engine/rows.py)
BLOCK = 64  # a vocabulary is filled up to a multiple (engine/sampling.py)
TABLES = 17  # bytes a slot: token, whether it was sampled, two log-probabilities (engine/rows.py)
PACKED = 45  # bytes a token of the batch as tensors (rl/update.py)
OBJECTS = 136  # bytes a token of the batch as Python's numbers, in completions and rows; the host's


class Learning(NamedTuple):
    """Bytes of one device; `sampling` and `update` with what is always there."""

    weights: int
    optimizer: int
    reference: int
    sampler: int  # a copy of the weights
    caches: int
    logits: int
    episodes: int
    sampling: int
    update: Moments

    @property
    def peak(self) -> int:
        return max(self.sampling, *self.update)

    def row(self) -> dict[str, Any]:
        names = {"sampling": self.sampling, **{f"update's {k}": v for k, v in self.update._asdict().items()}}
        return self._asdict() | {
            "update": self.update._asdict(), "peak": self.peak, "peak_in": max(names, key=lambda name: names[name])
        }  # fmt: skip


def rl_memory(spec: ModelSpec, c: RLConfig, cpu: bool = False) -> Learning:
    """What the learner's device holds. cpu: see Setting; memory that nobody wrote to is not there."""
    s = setting(c, cpu)
    numbers, found = held(spec, s)
    matrix = sum(m.numbers for m in found)
    weights, optimizer = FP32 * numbers, FP32 * (matrix + 2 * (numbers - matrix))
    if s.leaves:
        optimizer = 0.0
    elif s.offload != "none":  # on a CPU it stays beside the copies that it steps
        optimizer += weights
    reference = weights if find_objective(c.objective, c.overrides).kl > 0 else 0.0
    episodes = c.problems * c.group * c.length * (PACKED + (OBJECTS if cpu else 0))
    still = weights + optimizer + reference + episodes
    copy, caches, logits = sampler_weights(spec, c, s), cache_bytes(spec, c, s), logit_bytes(spec, c, s)
    written = min(1.0, c.problems / rows_of(c)) if cpu else 1.0  # of the caches; what nobody wrote to is not there yet
    prompts = caches * written + prompt_bytes(spec, c, s)
    sampling = still + max(copy + prompts, copy + caches + max(logits, token_bytes(spec, c, s)), weights if copy else 0)
    moments = update(spec, c, s, still, weights)
    busy = update_bytes(found, 0 if s.leaves else numbers - matrix, s)
    last = round(still + (0 if s.leaves else weights) + busy)
    return Learning(
        round(weights), round(optimizer), round(reference), round(copy), caches, logits, episodes, round(sampling),
        Moments(*moments, last),
    )  # fmt: skip


def setting(c: RLConfig, cpu: bool) -> Setting:
    """The update as a training step. accumulate: whether gradients wait for more parts of a minibatch.

    A group that shares its prompt is strands of `length` on fewer tokens, and a microbatch takes as many more of them.
    """
    prompt, room = prompt_of(c), c.rows * c.length
    group = prompt + c.group * (c.length - prompt) if c.share_prompts else c.group * c.length
    batch = group * c.problems / c.minibatches
    return Setting(
        rows=max(1, round(min(room, batch) / c.length)), length=c.length, precision=c.precision, recompute=c.recompute,
        accumulate=math.ceil(batch / room), cpu=cpu, offload=c.offload, strands=c.group * c.length / group,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------- sampling
def prompt_of(c: RLConfig) -> int:
    return max(1, c.length - c.max_tokens)


def rows_of(c: RLConfig) -> int:
    """Episodes that are generated at the same time."""
    return min(c.max_rows, c.problems * c.group)


def sampler_weights(spec: ModelSpec, c: RLConfig, s: Setting) -> float:
    """The copy in bf16, which shares an fp32 head (`rl/precision.py`)."""
    if c.precision == "fp32":
        return 0.0
    shared = spec.vocab_size * spec.d_model if c.fp32_head and not spec.tie_embeddings else 0
    return s.wide * (spec.num_params() - shared)


def cache_bytes(spec: ModelSpec, c: RLConfig, s: Setting) -> int:
    """All caches with a spare slot, tables beside them, and the largest layer as it was before it grew."""
    rows, columns = rows_of(c), c.length + 1
    token, state = spec.cache_bytes_per_token(s.wide), spec.state_bytes(FP32)
    largest = max(layer.mixer.cache_per_token() for layer in spec.layers) * s.wide
    tables = TABLES * columns + (FP32 * columns * _chosen(spec) if c.replay == "sampler" else 0)
    return rows * (token * (columns + 1) + state + largest * outgrown(c) + tables)


def outgrown(c: RLConfig) -> int:
    """Slots of a row before they grew for the last time; 0: they never do. They grow layer by layer."""
    first, columns = prompt_of(c) + SPAN, c.length + 1
    size, before = COLUMNS if first <= COLUMNS else max(first, 2 * COLUMNS), 0
    while size < columns:
        size, before = 2 * size, size
    return before


def _chosen(spec: ModelSpec) -> int:
    return sum(layer.ffn.top_k for layer in spec.layers if isinstance(layer.ffn, MoE))


def logit_bytes(spec: ModelSpec, c: RLConfig, s: Setting) -> int:
    """Of a step: logits, log-probabilities, at another temperature scaled and again; probabilities, in blocks.

    Truncation sorts what it has scaled: values, places (8 bytes), probabilities, what is kept, sums, and puts them back.
    """
    vocab = spec.vocab_size
    tensors = FP32 * (3 if c.temperature == 1 else 5)
    if c.top_p < 1 or c.top_k or c.min_p:
        tensors = FP32 * 8 + 8 + 3
    filled = FP32 * (-(-vocab // BLOCK) * BLOCK) if vocab % BLOCK else 0
    cast = s.wide if s.wide < FP32 and not c.fp32_head else 0
    return rows_of(c) * (vocab * (tensors + cast) + filled)


def prompt_bytes(spec: ModelSpec, c: RLConfig, s: Setting) -> int:
    """Activations of a piece of prompts, of which a group shares one."""
    prompt = prompt_of(c)
    piece = min(PIECE, c.problems * prompt)
    return live(spec, Setting(rows=max(1, piece // prompt), length=prompt, precision=c.precision, cpu=s.cpu))


def token_bytes(spec: ModelSpec, c: RLConfig, s: Setting) -> int:
    """Activations of one token of every row, before its logits."""
    one = Setting(rows=rows_of(c), length=1, precision=c.precision, cpu=s.cpu)
    return live(spec, one) + one.rows * one.wide * c.length * len({m.window for m in _attention(spec)})


def _attention(spec: ModelSpec) -> list[GQA]:
    return [layer.mixer for layer in spec.layers if isinstance(layer.mixer, GQA)]


def live(spec: ModelSpec, s: Setting) -> int:
    """A forward pass without a backward pass: the stream thrice, and the widest part of a layer."""
    widest = max(LIVE[part.kind](part, spec.d_model, s) for y in spec.layers for part in (y.mixer, y.ffn))
    masks = any(not isinstance(layer.mixer, Lightning | GatedDeltaNet) for layer in spec.layers)
    return s.tokens * (3 * s.wide * spec.d_model + widest + masks * s.wide * s.length)


# --------------------------------------------------------------------------------------------- update
def update(spec: ModelSpec, c: RLConfig, s: Setting, still: float, weights: float) -> tuple[int, int]:
    """The ends of the forward pass and the worst of the backward pass, of one part of a minibatch."""
    plain = spec.model_copy(update={"mtp": 0})
    said = round(s.strands * s.rows * min(c.max_tokens, c.length))  # tokens that the model wrote
    table, states = spec.vocab_size * spec.d_model, said * spec.d_model
    kept = forward_kept(plain, s) + FP32 * states  # which are picked out
    if s.wide < FP32 and not c.fp32_head:
        kept += s.wide * (states + table)
    chunk = FP32 * min(said, max(spec.d_model, LOGITS // spec.vocab_size)) * spec.vocab_size
    reference = live(plain, s) if find_objective(c.objective, c.overrides).kl > 0 else 0
    waits = s.accumulate > 1 and not (s.leaves and s.offload == "gradients")
    still += weights if waits else 0  # gradients
    head = FP32 * (states + table)  # gradients of the head's product
    begin = kept + head + max(2 * chunk, chunk + FP32 * table)
    forward = still + kept + max(2 * chunk, reference)
    return round(forward), round(still + max(begin, after_backward(plain, s, kept, head)))
