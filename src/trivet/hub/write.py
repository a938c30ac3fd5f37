"""A ModelSpec as a config.json: the way back of the readers, and checked by them.

`words` says a spec in every key that any family knows. The family's own reader then picks the keys that
it understands, and the spec that it makes of them is compared with the one to be written, trait by trait.
So a family that has a reader has a writer, and what it has no words for is an error that names the trait.

Compared is what a forward pass computes. How a router is balanced in training (`bias_rate`, `balance`) is
not in any of these files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

from trivet.config import UserError, nearest
from trivet.hub import read_spec
from trivet.hub.config import Config
from trivet.hub.names import FAMILY_NAMES
from trivet.spec import GQA, MLA, GatedDeltaNet, Lightning, ModelSpec, MoE, PostNorm, Rope, SwiGLU

# What transformers calls a family's class, in the order in which families are tried.
CLASSES = {
    "llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM",
    "mixtral": "MixtralForCausalLM", "qwen2_moe": "Qwen2MoeForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM",
    "qwen3_next": "Qwen3NextForCausalLM", "minimax_m2": "MiniMaxM2ForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM", "deepseek_v3": "DeepseekV3ForCausalLM",
    "minimax": "MiniMaxForCausalLM", "minimax_m1": "MiniMaxM1ForCausalLM",
    "minimax_text_01": "MiniMaxText01ForCausalLM",
}  # fmt: skip
T = TypeVar("T")
TRAINING_ONLY = {"bias_rate", "balance"}


def write_config(spec: ModelSpec, family: str | None = None) -> dict[str, Any]:
    """The config.json of a model of this family; None: the first one that can say the spec.

    `read_config` of it has layers equal to the spec's. Raises UserError naming the first trait that the
    family (or, with None, the nearest one) has no word for.
    """
    if family is not None:
        if family not in CLASSES:
            raise UserError(f"No family {family!r}; there are {', '.join(CLASSES)}.{nearest(family, CLASSES)}")
        config, wrong = _attempt(spec, _asked(spec, family))
        if wrong:
            raise UserError(f"A {family} config can't say this model: {wrong[0]}.")
        return config
    nearest_family: tuple[str, list[str]] | None = None
    refusals: list[tuple[int, str]] = []
    for name in CLASSES:
        asked = _asked(spec, name)
        try:
            config, wrong = _attempt(spec, asked)
        except UserError as e:  # it needs what this model does not have, or refuses what it has
            refusals.append((len(asked.read & asked.data.keys()), str(e)))
            continue
        if not wrong:
            return config
        if nearest_family is None or len(wrong) < len(nearest_family[1]):
            nearest_family = name, wrong
    if nearest_family is None:  # then the one that understood most of it
        raise UserError(f"No family's config can say this model. {max(refusals)[1]}")
    name, wrong = nearest_family
    raise UserError(f"No family's config can say this model; {name} is the nearest, but {wrong[0]}.")


def rewrite_config(config: dict[str, Any], before: ModelSpec, after: ModelSpec) -> dict[str, Any]:
    """A config.json that describes `before`, changed as little as it takes to describe `after`. Raises UserError."""

    def wrong(data: dict[str, Any]) -> list[str]:
        return list(differences(after, _said(Config(data, "the changed config"), after)))

    old, new = words(before), words(after)
    changed = {key: value for key, value in new.items() if value != old.get(key)}
    written = config | {key: value for key, value in changed.items() if config.get(key) is not None}
    for key in [key for key in changed if written.get(key) is None]:
        if len(wrong(written | {key: changed[key]})) < len(wrong(written)):  # a default held before and no longer does
            written[key] = changed[key]
    for first in wrong(written):
        raise UserError(f"A {config['model_type']} config can't say this part of the model: {first}.")
    return written


def _asked(spec: ModelSpec, family: str) -> Config:
    return Config({"model_type": family, **words(spec)}, f"As {family}, this model")


def _attempt(spec: ModelSpec, config: Config) -> tuple[dict[str, Any], list[str]]:
    """A config of this family, and what it says wrong. Raises UserError where the reader needs what is not there."""
    family = config.data["model_type"]
    try:
        wrong = list(differences(spec, _said(config, spec)))
    except UserError as e:  # nobody misspelt anything
        raise UserError(str(e).partition(" Did you mean")[0]) from None
    taken = {key: value for key, value in config.data.items() if key in config.read}
    return {"architectures": [CLASSES[family]], "model_type": family, **taken}, wrong


def _said(config: Config, spec: ModelSpec) -> ModelSpec:
    """What the reader makes of it. Where no config counts prediction modules, one can be stored without a word."""
    said, names = read_spec(config), FAMILY_NAMES[config.data["model_type"]]
    return said if names.mtp_counted else said.model_copy(update={"mtp": min(spec.mtp, 1)})


# ------------------------------------------------------------------------------------ trait by trait
def differences(ours: ModelSpec, theirs: ModelSpec) -> Iterator[str]:
    """Where two specs compute differently, whatever their tables and patterns call things."""
    mine, its = (s.model_dump(exclude={"pattern", "mixers", "ffns", "residuals"}) for s in (ours, theirs))
    yield from (f"its {key} is {mine[key]} and not {its[key]}" for key in mine if mine[key] != its[key])
    a, b = ours.layers, theirs.layers
    if len(a) != len(b):
        yield f"it has {len(a)} layers and not {len(b)}"
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x == y:
            continue
        mine, its = (_flat(layer.model_dump()) for layer in (x, y))
        kinds = [part for part in ("mixer", "ffn", "residual") if mine[f"{part}.kind"] != its[f"{part}.kind"]]
        for part in kinds:
            yield f"layer {i}'s {part} is {mine[f'{part}.kind']} and not {its[f'{part}.kind']}"
        for key in mine:
            if key in its and mine[key] != its[key] and key.partition(".")[0] not in kinds:
                yield f"layer {i}'s {key} is {mine[key]} and not {its[key]}"


def _flat(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"rope": {"dims": 8}}` as `{"rope.dims": 8}`, without what matters in training only, or not at all."""
    found: dict[str, Any] = {}
    for key, value in data.items():
        if key in TRAINING_ONLY or (key == "group_score" and data["groups"] == 1):
            continue
        found |= {prefix + key: value}
        if isinstance(value, dict) and key in ("mixer", "ffn", "residual", "rope"):
            del found[prefix + key]
            found |= _flat(value, f"{prefix}{key}.")
    return found


# -------------------------------------------------------------------------------------- spec -> words
def words(spec: ModelSpec) -> dict[str, Any]:
    """Every key by which some family says what this spec is, and switches of which one value is computed.

    A key that families read differently (`intermediate_size`) says the width of the dense layers, if there are any.
    """
    layers = spec.layers
    moe = _first(MoE, [layer.ffn for layer in layers], spec.ffns)
    dense = _first(SwiGLU, [layer.ffn for layer in layers], {} if moe else spec.ffns)
    width = dense.hidden if dense else moe.hidden if moe else None
    return {
        "vocab_size": spec.vocab_size, "hidden_size": spec.d_model, "intermediate_size": width,
        "num_hidden_layers": len(layers), "num_nextn_predict_layers": spec.mtp, "hidden_act": "silu",
        "max_position_embeddings": spec.context_length, "rms_norm_eps": spec.norm_eps,
        "tie_word_embeddings": spec.tie_embeddings, "mlp_bias": False, "attention_bias": False,
        **_mixer_words(spec), **(_moe_words(spec, moe) if moe else {}), **_residual_words(spec),
    }  # fmt: skip


def _first(kind: type[T], used: Sequence[object], table: Mapping[str, object]) -> T | None:
    """Of the layers; else of the tables, where a part of a model keeps what none of its layers uses."""
    return next((x for x in (*used, *table.values()) if isinstance(x, kind)), None)


def _mixer_words(spec: ModelSpec) -> dict[str, Any]:
    mixers = [layer.mixer for layer in spec.layers]
    types = ["linear_attention" if isinstance(m, Lightning | GatedDeltaNet) else "full_attention" for m in mixers]
    said: dict[str, Any] = {"layer_types": types, "attn_type_list": [int(t == "full_attention") for t in types]}
    mla, lightning = _first(MLA, mixers, {}), _first(Lightning, mixers, {})
    delta = _first(GatedDeltaNet, mixers, spec.mixers)
    gqa = _first(GQA, mixers, {} if mla else spec.mixers)
    if delta:
        said |= {
            "linear_num_value_heads": delta.heads, "linear_num_key_heads": delta.key_heads,
            "linear_key_head_dim": delta.key_dim, "linear_value_head_dim": delta.value_dim,
            "linear_conv_kernel_dim": delta.conv,
        }  # fmt: skip
    if gqa and delta:  # what MiniMax calls rotary_dim; others refuse any word for it
        said["partial_rotary_factor"] = gqa.rope.dims / gqa.head_dim
    if gqa and gqa.chunks:
        chunks = {"chunk_size": gqa.chunks.chunk_size, "local_size": gqa.chunks.local_size}
        if gqa.chunks.original_length is not None:
            chunks["original_max_position_embeddings"] = gqa.chunks.original_length
        said["dual_chunk_attention_config"] = chunks
    if gqa:
        said |= {
            "num_attention_heads": gqa.heads, "num_key_value_heads": gqa.kv_heads, "head_dim": gqa.head_dim,
            "rotary_dim": gqa.rope.dims, "qkv_bias": gqa.qkv_bias, "use_sliding_window": False,
            "sliding_window": None, "use_qk_norm": True, "qk_norm_type": "per_layer", **_rope_words(gqa.rope),
        }  # fmt: skip
    elif mla:
        said |= {
            "num_attention_heads": mla.heads, "num_key_value_heads": mla.heads, "head_dim": mla.rope.dims,
            "q_lora_rank": mla.q_rank, "kv_lora_rank": mla.kv_rank, "qk_nope_head_dim": mla.nope_dim,
            "qk_rope_head_dim": mla.rope.dims, "v_head_dim": mla.v_dim, "rope_interleave": mla.rope.interleaved,
            **_rope_words(mla.rope),
        }  # fmt: skip
    elif lightning:
        said |= {"num_attention_heads": lightning.heads, "head_dim": lightning.head_dim}
    elif delta:  # no layer looks at them, but none of its readers does without
        said |= {"num_attention_heads": delta.heads, "head_dim": 8}
    return said


def _rope_words(rope: Rope) -> dict[str, Any]:
    """In the words of older files, which transformers 5 and the rest of the world read too."""
    scaling: dict[str, Any] | None = None
    if rope.yarn is not None:
        y = rope.yarn
        scaling = {
            "rope_type": "yarn", "factor": y.factor, "original_max_position_embeddings": y.original_length,
            "beta_fast": y.beta_fast, "beta_slow": y.beta_slow,
        }  # fmt: skip
        if y.mscale_all_dim:
            scaling |= {"mscale": y.mscale, "mscale_all_dim": y.mscale_all_dim}
    elif rope.llama3 is not None:
        scaling = {
            "rope_type": "llama3", "factor": rope.llama3.factor, "low_freq_factor": rope.llama3.low_freq_factor,
            "high_freq_factor": rope.llama3.high_freq_factor,
            "original_max_position_embeddings": rope.llama3.original_length,
        }  # fmt: skip
    return {"rope_theta": rope.theta, "rope_scaling": scaling}


def _moe_words(spec: ModelSpec, moe: MoE) -> dict[str, Any]:
    kinds = [layer.ffn.kind for layer in spec.layers]
    topk = "noaux_tc" if moe.selection_bias else "group_limited_greedy" if moe.groups > 1 else "greedy"
    return {
        "n_routed_experts": moe.experts, "num_experts": moe.experts, "num_local_experts": moe.experts,
        "num_experts_per_tok": moe.top_k, "moe_intermediate_size": moe.hidden,
        "n_shared_experts": moe.shared_hidden // moe.hidden, "shared_expert_intermediate_size": moe.shared_hidden,
        "shared_intermediate_size": 0, "scoring_func": moe.score, "norm_topk_prob": moe.norm_topk,
        "routed_scaling_factor": moe.scale, "n_group": moe.groups, "topk_group": moe.top_groups, "topk_method": topk,
        "use_routing_bias": True,
        "first_k_dense_replace": (*kinds, "moe").index("moe"), "moe_layer_freq": 1, "decoder_sparse_step": 1, "mlp_only_layers": [],
    }  # fmt: skip


def _residual_words(spec: ModelSpec) -> dict[str, Any]:
    """MiniMax's factors, in both of its spellings."""
    said: dict[str, Any] = {"postnorm": True}
    for layer in spec.layers:
        if isinstance(layer.residual, PostNorm):
            r = layer.residual
            ours, long = ("linear_attn", "linear_attention") if isinstance(layer.mixer, Lightning) else (
                "full_attn", "full_attention")  # fmt: skip
            for short, name, alpha, beta in (
                (ours, long, r.mixer_alpha, r.mixer_beta), ("mlp", "mlp", r.ffn_alpha, r.ffn_beta),
            ):  # fmt: skip
                said |= {f"{short}_alpha_factor": alpha, f"{short}_beta_factor": beta}
                said |= {f"layernorm_{name}_alpha": alpha, f"layernorm_{name}_beta": beta}
    return said
