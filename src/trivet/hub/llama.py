"""Llama 2 and 3, their shape in other hands (R1-Distill-Llama, DeepSeek-67B), and Mixtral."""

from __future__ import annotations

from typing import Any

from trivet.hub.config import Config
from trivet.spec import FFN, GQA, ModelSpec, MoE, SwiGLU


def llama(c: Config) -> ModelSpec:
    c.only("attention_bias", False)
    c.only("mlp_bias", False)
    return decoder(c, attention(c), SwiGLU(hidden=c.take("intermediate_size")))


def mixtral(c: Config) -> ModelSpec:
    c.only("sliding_window", None)
    moe = MoE(
        experts=c.take("num_local_experts"), top_k=c.take("num_experts_per_tok"), hidden=c.take("intermediate_size"),
        score="softmax", selection_bias=False,
    )  # fmt: skip
    return decoder(c, attention(c), moe)


def attention(c: Config, rotated: float | None = None, **traits: Any) -> GQA:
    """Grouped-query attention as nearly every family writes it. rotated: the part of a head that some turn."""
    heads = c.take("num_attention_heads")
    head_dim = c.take("head_dim", c.take("hidden_size") // heads)
    return GQA(
        heads=heads, kv_heads=c.take("num_key_value_heads", heads), head_dim=head_dim,
        rope=c.rope(head_dim, part=rotated), **traits,
    )  # fmt: skip


def decoder(c: Config, mixer: GQA, ffn: FFN) -> ModelSpec:
    """Pre-norm layers that are all alike."""
    c.only("hidden_act", "silu")
    kind = "moe" if isinstance(ffn, MoE) else "dense"
    return ModelSpec(
        vocab_size=c.take("vocab_size"), d_model=c.take("hidden_size"),
        pattern=f"gqa/{kind}*{c.take('num_hidden_layers')}", mixers={"gqa": mixer}, ffns={kind: ffn},
        tie_embeddings=c.take("tie_word_embeddings", False), norm_eps=c.take("rms_norm_eps", 1e-6),
        context_length=c.take("max_position_embeddings", 2048),
    )  # fmt: skip
