"""DeepSeek-V2, V2-Lite, V3 and R1: latent attention, shared and routed experts, and V3's prediction module."""

from __future__ import annotations

from typing import Literal

from trivet.hub.config import Config
from trivet.spec import MLA, ModelSpec, MoE, SwiGLU


def deepseek_v2(c: Config) -> ModelSpec:
    greedy = c.take("topk_method", "greedy") == "greedy"
    c.only("topk_method", "greedy", "group_limited_greedy")
    c.only("scoring_func", "softmax")
    c.only("norm_topk_prob", False)  # transformers never divides here, and DeepSeek's own code then drops the scale
    c.only("rope_interleave", True)
    groups = 1 if greedy else c.take("n_group")
    c.take("n_group", None), c.take("topk_group", None)
    moe = _moe(c, "softmax", False, groups, c.take("topk_group") if groups > 1 else 1)
    return _model(c, moe.model_copy(update={"group_score": "max", "selection_bias": False}), mtp=0)


def deepseek_v3(c: Config) -> ModelSpec:
    c.only("topk_method", "noaux_tc")
    c.only("scoring_func", "sigmoid")
    c.quantized()
    moe = _moe(c, "sigmoid", c.take("norm_topk_prob", True), c.take("n_group", 1), c.take("topk_group", 1))
    return _model(c, moe, mtp=c.take("num_nextn_predict_layers", 0))


def _moe(c: Config, score: Literal["softmax", "sigmoid"], norm_topk: bool, groups: int, top_groups: int) -> MoE:
    c.only("moe_layer_freq", 1)
    width = c.take("moe_intermediate_size")
    return MoE(
        experts=c.take("n_routed_experts"), top_k=c.take("num_experts_per_tok"), hidden=width,
        shared_hidden=width * (c.take("n_shared_experts", 0)), score=score, norm_topk=norm_topk,
        scale=c.take("routed_scaling_factor", 1.0), groups=groups, top_groups=top_groups,
    )  # fmt: skip


def _model(c: Config, moe: MoE, mtp: int) -> ModelSpec:
    c.only("hidden_act", "silu")
    c.only("attention_bias", False)
    c.only("mlp_bias", False)
    for derived in ("num_key_value_heads", "head_dim", "qk_head_dim"):  # of no use to latent attention
        c.take(derived, None)
    mla = MLA(
        heads=c.take("num_attention_heads"), kv_rank=c.take("kv_lora_rank"), q_rank=c.take("q_lora_rank", None),
        nope_dim=c.take("qk_nope_head_dim"), v_dim=c.take("v_head_dim"),
        rope=c.rope(c.take("qk_rope_head_dim"), interleaved=c.take("rope_interleave", True)),
    )  # fmt: skip
    layers, dense = c.take("num_hidden_layers"), c.take("first_k_dense_replace", 0)
    first = f"mla/dense*{dense} " if dense else ""
    return ModelSpec(
        vocab_size=c.take("vocab_size"), d_model=c.take("hidden_size"), pattern=f"{first}mla/moe*{layers - dense}",
        mixers={"mla": mla}, ffns={"dense": SwiGLU(hidden=c.take("intermediate_size")), "moe": moe}, mtp=mtp,
        tie_embeddings=c.take("tie_word_embeddings", False), norm_eps=c.take("rms_norm_eps", 1e-6),
        context_length=c.take("max_position_embeddings", 2048),
    )  # fmt: skip
