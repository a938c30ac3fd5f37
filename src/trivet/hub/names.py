"""Whose tensor is which: every tensor of a checkpoint as a part of ours, both ways.

A `Slot` says: the part `pick` of the checkpoint's tensor, seen as `view` where its rows are interleaved,
is the part `at` of our tensor, transposed or not. Parts are disjoint and cover both sides, so the same
list loads a checkpoint and writes one. A family is a `Names`: what differs between them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from trivet.hub.part import Part
from trivet.spec import MLA, LayerSpec, Lightning, ModelSpec, MoE


@dataclass(frozen=True)
class Slot:
    theirs: str
    ours: str
    at: tuple[int, ...] = ()  # leading indices of our tensor
    transposed: bool = False
    view: tuple[int, ...] = ()  # leading dimensions that theirs unflattens into
    pick: int | None = None  # which entry of the second of these dimensions
    rows: tuple[int, ...] = ()  # the rows of theirs that a part of the model has; (): all


ATTENTION = {f"{p}_proj.{kind}": f"self_attn.{p}_proj.{kind}" for p in "qkv" for kind in ("weight", "bias")} | {
    "o_proj.weight": "self_attn.o_proj.weight",
    "q_norm.weight": "self_attn.q_norm.weight",
    "k_norm.weight": "self_attn.k_norm.weight",
}


@dataclass(frozen=True)
class Names:
    """Names within a layer. `{e}` is an expert's number."""

    ffn: str = "mlp"
    parts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    router: str = "mlp.gate.weight"
    router_bias: str = "mlp.gate.e_score_correction_bias"
    expert: str = "mlp.experts.{e}"
    expert_parts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    shared: str = "mlp.shared_experts"
    shared_gate: str = "mlp.shared_expert_gate.weight"


LATENT = {
    "q_proj.0.weight": "self_attn.q_proj.weight",
    "kv_down.weight": "self_attn.kv_a_proj_with_mqa.weight",
    "kv_norm.weight": "self_attn.kv_a_layernorm.weight",
    "kv_up.weight": "self_attn.kv_b_proj.weight",
    "o_proj.weight": "self_attn.o_proj.weight",
}
COMPRESSED_QUERY = {
    "q_proj.0.weight": "self_attn.q_a_proj.weight",
    "q_proj.1.weight": "self_attn.q_a_layernorm.weight",
    "q_proj.2.weight": "self_attn.q_b_proj.weight",
}
LIGHTNING = {
    "gate.weight": "self_attn.output_gate.weight",
    "norm.weight": "self_attn.norm.weight",
    "o_proj.weight": "self_attn.out_proj.weight",
}
MIXTRAL = Names(
    router="block_sparse_moe.gate.weight", expert="block_sparse_moe.experts.{e}", expert_parts=("w1", "w3", "w2")
)  # fmt: skip
FAMILY_NAMES = {
    "llama": Names(),
    "qwen2": Names(),
    "qwen3": Names(),
    "qwen3_moe": Names(),
    "qwen2_moe": replace(Names(), shared="mlp.shared_expert"),
    "deepseek_v2": Names(),
    "deepseek_v3": Names(),
    "mixtral": MIXTRAL,
    "minimax": MIXTRAL,
    "minimax_m1": MIXTRAL,
    "minimax_text_01": MIXTRAL,
}


def slots(spec: ModelSpec, names: Names, part: Part | None = None) -> Iterator[Slot]:
    """Every tensor of a checkpoint of this family, and where it belongs. `part`: which of its layers and experts ours are."""
    numbers, experts = (part.layers, part.experts) if part else (range(len(spec.layers)), None)
    yield Slot("model.embed_tokens.weight", "embed")
    yield Slot("model.norm.weight", "norm.weight")
    if not spec.tie_embeddings:
        yield Slot("lm_head.weight", "head")
    for i, layer in enumerate(spec.layers):
        yield from _layer(layer, f"model.layers.{numbers[i]}.", f"layers.{i}.", names, experts)
    for k in range(spec.mtp):  # stored as one more layer (DeepSeek-V3's README_WEIGHTS)
        theirs, ours = f"model.layers.{len(spec.layers) + k}.", f"mtp.{k}."
        yield Slot(theirs + "enorm.weight", ours + "embed_norm.weight")
        yield Slot(theirs + "hnorm.weight", ours + "hidden_norm.weight")
        yield Slot(theirs + "eh_proj.weight", ours + "eh_proj.weight")
        yield Slot(theirs + "shared_head.norm.weight", ours + "norm.weight")
        yield from _layer(spec.layers[-1], theirs, ours + "layer.", names, experts)


def shared_copies(spec: ModelSpec) -> dict[str, str]:
    """Tensors that a checkpoint may store a second time, and the one that they must equal."""
    embed = "model.embed_tokens.weight"
    copies = {"lm_head.weight": embed} if spec.tie_embeddings else {}
    for k in range(spec.mtp):
        layer = f"model.layers.{len(spec.layers) + k}."
        copies[layer + "embed_tokens.weight"] = embed
        copies[layer + "shared_head.head.weight"] = embed if spec.tie_embeddings else "lm_head.weight"
    return copies


def _layer(layer: LayerSpec, theirs: str, ours: str, names: Names, experts: tuple[int, ...] | None) -> Iterator[Slot]:
    yield Slot(theirs + "input_layernorm.weight", ours + "mixer_norm.weight")
    yield Slot(theirs + "post_attention_layernorm.weight", ours + "ffn_norm.weight")
    yield from _mixer(layer, theirs, ours + "mixer.")
    ffn = layer.ffn
    if not isinstance(ffn, MoE):
        yield from _swiglu(theirs + names.ffn, names.parts, ours + "ffn.")
        return
    yield Slot(theirs + names.router, ours + "ffn.router", rows=experts or ())
    if ffn.selection_bias:
        yield Slot(theirs + names.router_bias, ours + "ffn.bias", rows=experts or ())
    for e, number in enumerate(experts or range(ffn.experts)):
        gate, up, down = (f"{theirs}{names.expert.format(e=number)}.{part}.weight" for part in names.expert_parts)
        yield Slot(gate, ours + "ffn.gate_up", (e, 0))
        yield Slot(up, ours + "ffn.gate_up", (e, 1))
        yield Slot(down, ours + "ffn.down", (e,), transposed=True)
    if ffn.shared_hidden:
        yield from _swiglu(theirs + names.shared, names.parts, ours + "ffn.shared.")
    if ffn.shared_gate:
        yield Slot(theirs + names.shared_gate, ours + "ffn.shared_gate")


def _mixer(layer: LayerSpec, theirs: str, ours: str) -> Iterator[Slot]:
    mixer = layer.mixer
    if isinstance(mixer, Lightning):  # per head: query, key and value rows
        for i, part in enumerate("qkv"):
            yield Slot(
                theirs + "self_attn.qkv_proj.weight", f"{ours}{part}_proj.weight", view=(mixer.heads, 3), pick=i
            )  # fmt: skip
        table = LIGHTNING
    elif isinstance(mixer, MLA):
        table = LATENT if mixer.q_rank is None else LATENT | COMPRESSED_QUERY
    else:
        left_out = set() if mixer.qk_norm else {"q_norm.weight", "k_norm.weight"}
        left_out |= set() if mixer.qkv_bias else {f"{p}_proj.bias" for p in "qkv"}
        table = {mine: its for mine, its in ATTENTION.items() if mine not in left_out}
    for mine, its in table.items():
        yield Slot(theirs + its, ours + mine)


def _swiglu(theirs: str, parts: tuple[str, str, str], ours: str) -> Iterator[Slot]:
    gate, up, down = parts
    yield Slot(f"{theirs}.{gate}.weight", ours + "gate_up", (0,))
    yield Slot(f"{theirs}.{up}.weight", ours + "gate_up", (1,))
    yield Slot(f"{theirs}.{down}.weight", ours + "down")
