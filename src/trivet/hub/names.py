"""Whose tensor is which: every tensor of a checkpoint as a part of ours, both ways.

A `Slot` says: the part `pick` of the checkpoint's tensor, of rows that lie in groups of `sizes` where
several matrices are interleaved, is the part `at` of our tensor, transposed or not. Parts are disjoint and
cover both sides, so the same list loads a checkpoint and writes one. A family is a `Names`: what differs
between them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from trivet.hub.part import Part
from trivet.spec import GQA, MLA, GatedDeltaNet, LayerSpec, Lightning, Mixer, ModelSpec, MoE


@dataclass(frozen=True)
class Slot:
    theirs: str
    ours: str
    at: tuple[int, ...] = ()  # leading indices of our tensor
    transposed: bool = False
    groups: int = 0  # that the rows of theirs are made of: a head, or several that belong together
    sizes: tuple[int, ...] = ()  # rows of each part of a group
    pick: int = 0  # which of these parts
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
    mtp: str = "model.layers.{n}."  # a prediction module: one more layer, as in DeepSeek-V3's README_WEIGHTS
    mtp_counted: bool = True  # by the config; False: what is stored is there
    mtp_layer: str = ""  # what its layer's own tensors begin with
    mtp_parts: tuple[str, str, str, str] = ("enorm", "hnorm", "eh_proj", "shared_head.norm")

    def module(self, spec: ModelSpec, k: int) -> str:
        """What the names of the k-th prediction module's tensors begin with."""
        return self.mtp.format(n=len(spec.layers) + k)


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
DELTA = {
    "conv": "linear_attn.conv1d.weight",
    "A_log": "linear_attn.A_log",
    "dt_bias": "linear_attn.dt_bias",
    "norm.weight": "linear_attn.norm.weight",
    "o_proj.weight": "linear_attn.out_proj.weight",
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
    "qwen3_next": Names(
        shared="mlp.shared_expert", mtp="mtp.", mtp_counted=False, mtp_layer="layers.0.",
        mtp_parts=("pre_fc_norm_embedding", "pre_fc_norm_hidden", "fc", "norm"),
    ),
    "deepseek_v2": Names(),
    "deepseek_v3": Names(),
    "mixtral": MIXTRAL,
    "minimax": MIXTRAL,
    "minimax_m1": MIXTRAL,
    "minimax_text_01": MIXTRAL,
    "minimax_m2": replace(MIXTRAL, router_bias="block_sparse_moe.e_score_correction_bias"),
}  # fmt: skip


def slots(spec: ModelSpec, names: Names, part: Part | None = None) -> Iterator[Slot]:
    """Every tensor of a checkpoint of this family, and where it belongs. `part`: which of its layers and experts ours are."""
    numbers, experts = (part.layers, part.experts) if part else (range(len(spec.layers)), None)
    yield Slot("model.embed_tokens.weight", "embed")
    yield Slot("model.norm.weight", "norm.weight")
    if not spec.tie_embeddings:
        yield Slot("lm_head.weight", "head")
    for i, layer in enumerate(spec.layers):
        yield from _layer(layer, f"model.layers.{numbers[i]}.", f"layers.{i}.", names, experts)
    for k in range(spec.mtp):
        theirs, ours = names.module(spec, k), f"mtp.{k}."
        for its, mine in zip(names.mtp_parts, ("embed_norm", "hidden_norm", "eh_proj", "norm"), strict=True):
            yield Slot(f"{theirs}{its}.weight", f"{ours}{mine}.weight")
        yield from _layer(spec.layers[-1], theirs + names.mtp_layer, ours + "layer.", names, experts)


def shared_copies(spec: ModelSpec, names: Names) -> dict[str, str]:
    """Tensors that a checkpoint may store a second time, and the one that they must equal."""
    embed = "model.embed_tokens.weight"
    copies = {"lm_head.weight": embed} if spec.tie_embeddings else {}
    for k in range(spec.mtp):
        module = names.module(spec, k)
        copies[module + "embed_tokens.weight"] = embed
        copies[module + "shared_head.head.weight"] = embed if spec.tie_embeddings else "lm_head.weight"
    return copies


def _layer(layer: LayerSpec, theirs: str, ours: str, names: Names, experts: tuple[int, ...] | None) -> Iterator[Slot]:
    yield Slot(theirs + "input_layernorm.weight", ours + "mixer_norm.weight")
    yield Slot(theirs + "post_attention_layernorm.weight", ours + "ffn_norm.weight")
    yield from _mixer(layer.mixer, theirs, ours + "mixer.")
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


def _mixer(mixer: Mixer, theirs: str, ours: str) -> Iterator[Slot]:
    yield from _interleaved(mixer, theirs, ours)
    if isinstance(mixer, Lightning):
        table = LIGHTNING
    elif isinstance(mixer, GatedDeltaNet):
        table = DELTA
    elif isinstance(mixer, MLA):
        table = LATENT if mixer.q_rank is None else LATENT | COMPRESSED_QUERY
    else:
        left_out = set() if mixer.qk_norm else {"q_norm.weight", "k_norm.weight"}
        left_out |= set() if mixer.qkv_bias else {f"{p}_proj.bias" for p in "qkv"}
        left_out |= {"q_proj.weight"} if mixer.out_gate else set()
        table = {mine: its for mine, its in ATTENTION.items() if mine not in left_out}
    for mine, its in table.items():
        yield Slot(theirs + its, ours + mine)


def _interleaved(mixer: Mixer, theirs: str, ours: str) -> Iterator[Slot]:
    """Several of our matrices that a checkpoint keeps as one, head by head."""
    tensors: dict[str, tuple[int, dict[str, int]]] = {}  # its name: groups, and rows of each part of a group
    if isinstance(mixer, Lightning):
        tensors["self_attn.qkv_proj.weight"] = mixer.heads, {f"{p}_proj": mixer.head_dim for p in "qkv"}
    elif isinstance(mixer, GatedDeltaNet):
        each = mixer.heads // mixer.key_heads  # value heads of a key head
        values = each * mixer.value_dim
        parts = {"q_proj": mixer.key_dim, "k_proj": mixer.key_dim, "v_proj": values, "gate": values}
        tensors["linear_attn.in_proj_qkvz.weight"] = mixer.key_heads, parts
        tensors["linear_attn.in_proj_ba.weight"] = mixer.key_heads, {"beta_proj": each, "decay_proj": each}
    elif isinstance(mixer, GQA) and mixer.out_gate:
        tensors["self_attn.q_proj.weight"] = mixer.heads, {"q_proj": mixer.head_dim, "gate": mixer.head_dim}
    for its, (groups, parts) in tensors.items():
        for i, mine in enumerate(parts):
            yield Slot(theirs + its, f"{ours}{mine}.weight", groups=groups, sizes=tuple(parts.values()), pick=i)


def _swiglu(theirs: str, parts: tuple[str, str, str], ours: str) -> Iterator[Slot]:
    gate, up, down = parts
    yield Slot(f"{theirs}.{gate}.weight", ours + "gate_up", (0,))
    yield Slot(f"{theirs}.{up}.weight", ours + "gate_up", (1,))
    yield Slot(f"{theirs}.{down}.weight", ours + "down")
