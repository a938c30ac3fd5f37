"""MiniMax-Text-01 and M1: seven lightning layers, then one of softmax attention, in DeepNorm-like post-norm. M2: plain.

Two spellings: the original remote code's (`attn_type_list`, `postnorm`, `layernorm_*_alpha`), which
rotates `rotary_dim` of the head, and transformers' `minimax` (`layer_types`, `*_attn_alpha_factor`), which
knows no `rotary_dim` and rotates the whole head.
"""

from __future__ import annotations

from trivet.hub.config import Config
from trivet.hub.llama import attention, decoder
from trivet.spec import Lightning, ModelSpec, MoE, PostNorm, Residual
from trivet.spec.pattern import write_pattern

PLACES = ("full_attention", "linear_attention", "mlp")


def minimax(c: Config) -> ModelSpec:
    """The original spelling."""
    c.only("postnorm", True)
    c.only("shared_intermediate_size", 0)
    c.take("shared_moe_mode", None)  # of the shared expert, and there is none
    c.take("shared_moe_coefficient", None)
    c.take("num_experts", None)
    dims = c.take("rotary_dim", None)
    scale = {key: (c.take(f"layernorm_{key}_alpha", 1.0), c.take(f"layernorm_{key}_beta", 1.0)) for key in PLACES}
    softmax = [bool(kind) for kind in c.take("attn_type_list")]
    return _model(c, softmax, dims, scale)


def transformers_minimax(c: Config) -> ModelSpec:
    names = dict(zip(PLACES, ("full_attn", "linear_attn", "mlp"), strict=True))
    scale = {
        key: (c.take(f"{name}_alpha_factor", 1.0), c.take(f"{name}_beta_factor", 1.0)) for key, name in names.items()
    }
    layers = c.take("num_hidden_layers")
    kinds = c.take("layer_types", ["linear_attention" if i % 2 == 0 else "full_attention" for i in range(layers)])
    c.take("rotary_dim", None)  # that code does not know it
    c.take("block_size", None)  # how the linear form is cut, not what it computes
    c.notes.append("transformers' spelling: every dimension of a head is rotated, as that code does")
    return _model(c, [kind == "full_attention" for kind in kinds], None, scale)


def minimax_m2(c: Config) -> ModelSpec:
    """Softmax attention everywhere, and V3's routing: the original's keys, and those that transformers writes."""
    c.only("scoring_func", "sigmoid")
    c.only("use_routing_bias", True)
    c.only("use_qk_norm", True)
    c.only("qk_norm_type", "per_layer")
    c.only("shared_intermediate_size", 0)
    c.only("sliding_window", None)
    c.only("attention_bias", False)
    if any(kind != 1 for kind in c.take("attn_type_list", [])):
        c.only("attn_type_list", None)
    for place in PLACES:
        c.only(f"layernorm_{place}_alpha", 1.0)
        c.only(f"layernorm_{place}_beta", 1.0)
    for unused in ("shared_moe_mode", "mlp_intermediate_size", "mtp_transformer_layers"):
        c.take(unused, None)  # of parts that it does not have
    if c.take("num_mtp_modules", 0) and c.take("use_mtp", False):
        c.notes.append("the prediction modules that its config counts are not computed")
    c.take("use_mtp", None)
    c.quantized()
    width = c.take("head_dim", c.take("hidden_size") // c.take("num_attention_heads"))
    gqa = attention(c, rotated=c.take("rotary_dim", width) / width, qk_norm=True, qk_norm_over="all")
    moe = MoE(
        experts=c.either("num_local_experts", "num_experts"), top_k=c.take("num_experts_per_tok"),
        hidden=c.take("intermediate_size"),
    )  # fmt: skip
    return decoder(c, gqa, moe)


def _model(c: Config, softmax: list[bool], rotated: int | None, scale: dict[str, tuple[float, float]]) -> ModelSpec:
    c.only("hidden_act", "silu")
    c.only("sliding_window", None)
    gqa = attention(c)
    if rotated is not None:
        gqa = gqa.model_copy(update={"rope": gqa.rope.model_copy(update={"dims": rotated})})
    moe = MoE(
        experts=c.take("num_local_experts"), top_k=c.take("num_experts_per_tok"), hidden=c.take("intermediate_size"),
        score="softmax", selection_bias=False,
    )  # fmt: skip
    mlp = dict(zip(("ffn_alpha", "ffn_beta"), scale["mlp"], strict=True))
    residuals: dict[str, Residual] = {}
    for name, key in (("softmax", "full_attention"), ("linear", "linear_attention")):
        alpha, beta = scale[key]
        residuals[name] = PostNorm(mixer_alpha=alpha, mixer_beta=beta, **mlp)
    layers = ["gqa/moe/softmax" if kind else "lightning/moe/linear" for kind in softmax]
    c.only("num_hidden_layers", len(layers))
    return ModelSpec(
        vocab_size=c.take("vocab_size"), d_model=c.take("hidden_size"), pattern=write_pattern(layers),
        mixers={"gqa": gqa, "lightning": Lightning(heads=gqa.heads, head_dim=gqa.head_dim)}, ffns={"moe": moe},
        residuals=residuals, tie_embeddings=c.take("tie_word_embeddings", False),
        norm_eps=c.take("rms_norm_eps", 1e-5), context_length=c.take("max_position_embeddings", 2048),
    )  # fmt: skip
