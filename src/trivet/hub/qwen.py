"""Qwen2 and 2.5 (R1-Distill-Qwen and Qwen2.5-1M too), Qwen2-MoE, Qwen3, Qwen3-MoE and Qwen3-Next."""

from __future__ import annotations

from trivet.hub.config import Config
from trivet.hub.llama import attention, decoder
from trivet.spec import DualChunks, GatedDeltaNet, ModelSpec, MoE, SwiGLU
from trivet.spec.pattern import write_pattern


def qwen2(c: Config) -> ModelSpec:
    _no_windows(c)
    gqa = attention(c, qkv_bias=True, chunks=_dual_chunks(c))
    return decoder(c, gqa, SwiGLU(hidden=c.take("intermediate_size")))


def _dual_chunks(c: Config) -> DualChunks | None:
    """Qwen2.5-1M's positions (arXiv 2501.15383); its sparse prefill changes the maths, so it is the user's to ask for."""
    found = c.take("dual_chunk_attention_config", None)
    if found is None:
        return None
    inner = Config(found, f"{c.where}: dual_chunk_attention_config")
    chunks = DualChunks(
        chunk_size=inner.take("chunk_size"), local_size=inner.take("local_size"),
        original_length=inner.take("original_max_position_embeddings", None),
    )  # fmt: skip
    sparse = [inner.take(f"sparse_attention_{key}", None) for key in ("enabled", "config", "threshold", "last_q")]
    inner.finish()
    if any(sparse[:2]):
        c.notes.append("its sparse prefill is not used, attention is exact")
    if chunks.original_length is not None:
        c.notes.append(
            f"logits of queries past token {chunks.original_length:,} are scaled by their own position, not by the prompt's "
            "length as in vLLM"
        )
    return chunks


def qwen2_moe(c: Config) -> ModelSpec:
    _no_windows(c)
    _every_layer_sparse(c)
    return decoder(c, attention(c, qkv_bias=c.take("qkv_bias", True)), _shared_moe(c, norm_topk=False))


def qwen3(c: Config) -> ModelSpec:
    _no_windows(c)
    c.only("attention_bias", False)
    return decoder(c, attention(c, qk_norm=True), SwiGLU(hidden=c.take("intermediate_size")))


def qwen3_moe(c: Config) -> ModelSpec:
    _no_windows(c)
    _every_layer_sparse(c)
    c.only("attention_bias", False)
    moe = MoE(
        experts=c.either("num_experts", "num_local_experts"), top_k=c.take("num_experts_per_tok"), hidden=c.take("moe_intermediate_size"),
        score="softmax", norm_topk=c.take("norm_topk_prob", False), selection_bias=False,
    )  # fmt: skip
    return decoder(c, attention(c, qk_norm=True), moe)


def qwen3_next(c: Config) -> ModelSpec:
    """Three gated DeltaNets, then one gated attention. Its prediction module is no part of the config."""
    c.only("use_sliding_window", False)
    c.only("hidden_act", "silu")
    c.only("attention_bias", False)
    c.quantized()
    _every_layer_sparse(c)
    layers, interval = c.take("num_hidden_layers"), c.take("full_attention_interval", 4)
    alternate = ["linear_attention" if (i + 1) % interval else "full_attention" for i in range(layers)]
    kinds = c.take("layer_types", alternate)
    c.only("num_hidden_layers", len(kinds))
    names = {"linear_attention": "delta/moe", "full_attention": "gqa/moe"}
    if not set(kinds) <= names.keys():
        c.only("layer_types", None)
    delta = GatedDeltaNet(
        heads=c.take("linear_num_value_heads"), key_heads=c.take("linear_num_key_heads"),
        key_dim=c.take("linear_key_head_dim"), value_dim=c.take("linear_value_head_dim"),
        conv=c.take("linear_conv_kernel_dim", 4),
    )  # fmt: skip
    return ModelSpec(
        vocab_size=c.take("vocab_size"), d_model=c.take("hidden_size"),
        pattern=write_pattern([names[kind] for kind in kinds]),
        mixers={"delta": delta, "gqa": attention(c, rotated=0.25, qk_norm=True, out_gate=True)},
        ffns={"moe": _shared_moe(c, norm_topk=True)},
        tie_embeddings=c.take("tie_word_embeddings", False), norm_eps=c.take("rms_norm_eps", 1e-6), centred_norms=True,
        context_length=c.take("max_position_embeddings", 32768),
    )  # fmt: skip


def _shared_moe(c: Config, norm_topk: bool) -> MoE:
    """Softmax routing beside a shared expert with a gate."""
    return MoE(
        experts=c.either("num_experts", "num_local_experts"), top_k=c.take("num_experts_per_tok"), hidden=c.take("moe_intermediate_size"),
        shared_hidden=c.take("shared_expert_intermediate_size"), shared_gate=True, score="softmax",
        norm_topk=c.take("norm_topk_prob", norm_topk), selection_bias=False,
    )  # fmt: skip


def _no_windows(c: Config) -> None:
    c.only("use_sliding_window", False)
    c.take("sliding_window", None)  # what it would be, were it used
    if any(kind != "full_attention" for kind in c.take("layer_types", [])):
        c.only("layer_types", None)


def _every_layer_sparse(c: Config) -> None:
    c.only("decoder_sparse_step", 1)
    c.only("mlp_only_layers", [], None)
    c.take("intermediate_size", None)  # of layers without experts, and there are none
