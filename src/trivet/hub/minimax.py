"""MiniMax-Text-01 and M1: seven lightning layers, then one of softmax attention, in DeepNorm-like post-norm.

Two spellings: the original remote code's (`attn_type_list`, `postnorm`, `layernorm_*_alpha`), which
rotates `rotary_dim` of the head, and transformers' `minimax` (`layer_types`, `*_attn_alpha_factor`), which
knows no `rotary_dim` and rotates the whole head.
"""

from __future__ import annotations

from trivet.hub.config import Config
from trivet.hub.llama import attention
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
