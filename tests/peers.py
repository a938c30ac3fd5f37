"""Transformers' models as peers: random weights in theirs, the same weights in ours.

For tests and benchmarks only, with configs small enough to build at random. Reading real
checkpoints (every family, every key accounted for) is a room of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from trivet.model import Transformer
from trivet.spec import GQA, MLA, ModelSpec, MoE, Rope, SwiGLU, Yarn


def randomise(model: nn.Module, seed: int = 0, std: float = 0.15) -> None:
    """Matrices with variance 1/fan_in, plus noise on everything: no norm is 1, no bias 0."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.copy_(torch.randn(p.shape, generator=g) * p.shape[-1] ** -0.5)
            else:
                p.add_(torch.randn(p.shape, generator=g) * std)
        for name, b in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                b.copy_(torch.randn(b.shape, generator=g) * std)


def rope_of(config: Any, dims: int, interleaved: bool) -> Rope:
    p = config.rope_parameters
    yarn = None
    if p["rope_type"] == "yarn":
        yarn = Yarn(
            factor=p["factor"], original_length=p["original_max_position_embeddings"],
            beta_fast=p.get("beta_fast", 32), beta_slow=p.get("beta_slow", 1),
            mscale=p.get("mscale", 1.0), mscale_all_dim=p.get("mscale_all_dim", 0.0),
        )  # fmt: skip
    return Rope(dims=dims, theta=p["rope_theta"], interleaved=interleaved, yarn=yarn)


def qwen3_spec(c: Any) -> ModelSpec:
    gqa = GQA(heads=c.num_attention_heads, kv_heads=c.num_key_value_heads, head_dim=c.head_dim, qk_norm=True,
              rope=rope_of(c, c.head_dim, False))  # fmt: skip
    return ModelSpec(
        vocab_size=c.vocab_size, d_model=c.hidden_size, pattern=f"gqa/dense*{c.num_hidden_layers}",
        mixers={"gqa": gqa}, ffns={"dense": SwiGLU(hidden=c.intermediate_size)},
        tie_embeddings=c.tie_word_embeddings, norm_eps=c.rms_norm_eps,
    )  # fmt: skip


def deepseek_v3_spec(c: Any) -> ModelSpec:
    mla = MLA(heads=c.num_attention_heads, kv_rank=c.kv_lora_rank, q_rank=c.q_lora_rank, nope_dim=c.qk_nope_head_dim,
              v_dim=c.v_head_dim, rope=rope_of(c, c.qk_rope_head_dim, c.rope_interleave))  # fmt: skip
    moe = MoE(experts=c.n_routed_experts, top_k=c.num_experts_per_tok, hidden=c.moe_intermediate_size,
              shared_hidden=c.n_shared_experts * c.moe_intermediate_size, norm_topk=c.norm_topk_prob,
              scale=c.routed_scaling_factor, groups=c.n_group, top_groups=c.topk_group)  # fmt: skip
    dense = c.first_k_dense_replace
    pattern = (f"mla/dense*{dense} " if dense else "") + f"mla/moe*{c.num_hidden_layers - dense}"
    return ModelSpec(
        vocab_size=c.vocab_size, d_model=c.hidden_size, pattern=pattern, mixers={"mla": mla},
        ffns={"dense": SwiGLU(hidden=c.intermediate_size), "moe": moe},
        tie_embeddings=c.tie_word_embeddings, norm_eps=c.rms_norm_eps,
    )  # fmt: skip


# Names within a layer, ours to theirs; where several are given they are stacked along a new first axis.
MIXER = {
    "q_proj.weight": "q_proj.weight", "k_proj.weight": "k_proj.weight", "v_proj.weight": "v_proj.weight",
    "q_norm.weight": "q_norm.weight", "k_norm.weight": "k_norm.weight", "o_proj.weight": "o_proj.weight",
    "kv_down.weight": "kv_a_proj_with_mqa.weight", "kv_norm.weight": "kv_a_layernorm.weight",
    "kv_up.weight": "kv_b_proj.weight",
}  # fmt: skip
COMPRESSED_Q = {"q_proj.0.weight": "q_a_proj.weight", "q_proj.1.weight": "q_a_layernorm.weight",
                "q_proj.2.weight": "q_b_proj.weight"}  # fmt: skip


def convert(theirs: dict[str, Tensor], spec: ModelSpec) -> dict[str, Tensor]:
    """A transformers state dict (Qwen3 or DeepSeek-V3) -> ours. Raises KeyError for what is missing."""
    left = dict(theirs)
    ours = {"embed": left.pop("model.embed_tokens.weight"), "norm.weight": left.pop("model.norm.weight")}
    head = left.pop("lm_head.weight")
    if not spec.tie_embeddings:
        ours["head"] = head
    for i, layer in enumerate(spec.layers):
        src, dst = f"model.layers.{i}.", f"layers.{i}."
        ours[dst + "mixer_norm.weight"] = left.pop(src + "input_layernorm.weight")
        ours[dst + "ffn_norm.weight"] = left.pop(src + "post_attention_layernorm.weight")
        names = dict(MIXER)
        if isinstance(layer.mixer, MLA):
            if layer.mixer.q_rank is None:
                names["q_proj.0.weight"] = names.pop("q_proj.weight")
            else:
                names |= COMPRESSED_Q
        for mine, its in names.items():
            if f"{src}self_attn.{its}" in left:
                ours[f"{dst}mixer.{mine}"] = left.pop(f"{src}self_attn.{its}")

        def swiglu(at: str, left: dict[str, Tensor] = left) -> tuple[Tensor, Tensor]:
            gate, up = (left.pop(f"{at}.{n}_proj.weight") for n in ("gate", "up"))
            return torch.stack((gate, up)), left.pop(f"{at}.down_proj.weight")

        if isinstance(layer.ffn, SwiGLU):
            ours[dst + "ffn.gate_up"], ours[dst + "ffn.down"] = swiglu(src + "mlp")
        else:
            ours[dst + "ffn.router"] = left.pop(src + "mlp.gate.weight")
            ours[dst + "ffn.bias"] = left.pop(src + "mlp.gate.e_score_correction_bias")
            ours[dst + "ffn.gate_up"] = left.pop(src + "mlp.experts.gate_up_proj").unflatten(1, (2, -1))
            ours[dst + "ffn.down"] = left.pop(src + "mlp.experts.down_proj").mT  # ours is input-major
            ours[dst + "ffn.shared.gate_up"], ours[dst + "ffn.shared.down"] = swiglu(src + "mlp.shared_experts")
    if left:
        raise KeyError(f"unused: {sorted(left)}")
    return {name: t.detach().clone().contiguous() for name, t in ours.items()}


def twin(theirs: nn.Module) -> Transformer:
    """Our model with the weights (and dtype) of a transformers Qwen3 or DeepSeek-V3 causal LM."""
    config: Any = theirs.config
    spec = {"qwen3": qwen3_spec, "deepseek_v3": deepseek_v3_spec}[config.model_type](config)
    ours = Transformer(spec).to(dtype=theirs.lm_head.weight.dtype, device=theirs.lm_head.weight.device)  # type: ignore[union-attr]
    ours.load_state_dict(convert(theirs.state_dict(), spec))
    return ours
