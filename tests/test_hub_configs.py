"""config.json -> ModelSpec, held against transformers' own models (counted on no device) and published figures."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from trivet.config import UserError
from trivet.hub import FAMILIES, catalog, known_model, known_names, read_config, read_config_file
from trivet.model.layers import inverse_frequencies
from trivet.spec import GQA, MLA, DualChunks, GatedDeltaNet, Lightning, MoE
from trivet.spec.pattern import expand_pattern, write_pattern

transformers = pytest.importorskip("transformers")
CONFIGS = {
    "llama": "LlamaConfig", "mixtral": "MixtralConfig", "qwen2": "Qwen2Config", "qwen2_moe": "Qwen2MoeConfig",
    "qwen3": "Qwen3Config", "qwen3_moe": "Qwen3MoeConfig", "deepseek_v2": "DeepseekV2Config",
    "deepseek_v3": "DeepseekV3Config", "minimax": "MiniMaxConfig", "qwen3_next": "Qwen3NextConfig", "minimax_m2": "MiniMaxM2Config",
}  # fmt: skip
YARN = {
    "rope_type": "yarn",
    "rope_theta": 5e5,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 16.0,
}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip
PLAIN = {"rope_type": "default", "rope_theta": 1e6}


def random_config(family: str, seed: int) -> Any:
    """A config of transformers with no value left as it comes, where shapes allow it."""
    rng = random.Random(f"{family} {seed}")
    kv = rng.choice([1, 2, 3])
    values: dict[str, Any] = {
        "vocab_size": rng.randrange(50, 90), "hidden_size": 8 * 9 * 2,  # of any number of heads below
        "intermediate_size": 8 * rng.randrange(3, 9), "num_hidden_layers": rng.randrange(2, 6),
        "num_attention_heads": kv * rng.choice([1, 2]) if kv != 3 else 3, "num_key_value_heads": kv, "head_dim": rng.choice([8, 12]),
        "tie_word_embeddings": rng.random() < 0.5, "rms_norm_eps": rng.choice([1e-5, 1e-6]),
        "max_position_embeddings": rng.choice([64, 128]), "rope_parameters": rng.choice([PLAIN, YARN]),
        "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip
    if family == "llama":
        values["rope_parameters"] = rng.choice([PLAIN, YARN, LLAMA3])
    if family == "qwen2":
        values |= {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32, "head_dim": 8}
    experts, top = rng.choice([6, 8]), rng.randrange(2, 4)  # of one expert with norm_topk the weight is always 1
    if family in ("mixtral", "minimax", "minimax_m2"):
        values |= {"num_local_experts": experts, "num_experts_per_tok": top}
    if family == "minimax":
        values |= {"rope_parameters": PLAIN, "full_attn_alpha_factor": 1.3, "linear_attn_beta_factor": 0.7,
                   "layer_types": None}  # fmt: skip
    if family in ("qwen2_moe", "qwen3_moe", "qwen3_next"):
        values |= {"num_experts": experts, "num_experts_per_tok": top, "moe_intermediate_size": 16,
                   "norm_topk_prob": rng.random() < 0.5}  # fmt: skip
    if family == "qwen2_moe":
        values |= {"shared_expert_intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2,
                   "hidden_size": 32, "head_dim": 8}  # fmt: skip
    if family == "qwen3_next":
        kinds = ["linear_attention", rng.choice(["linear_attention", "full_attention"])]
        keys = rng.choice([1, 2])
        values |= {
            "shared_expert_intermediate_size": 24, "linear_num_key_heads": keys, "linear_conv_kernel_dim": rng.choice([3, 4]),
            "linear_num_value_heads": keys * rng.choice([1, 2, 3]), "linear_key_head_dim": 8,
            "linear_value_head_dim": rng.choice([8, 12]), "num_hidden_layers": 3, "layer_types": [*kinds, "full_attention"],
            "head_dim": 16, "partial_rotary_factor": rng.choice([0.25, 0.5]),
        }  # fmt: skip
    if family == "minimax_m2":
        values |= {"rotary_dim": rng.choice([4, values["head_dim"]])}
    if family.startswith("deepseek"):
        heads = values["num_attention_heads"]
        values |= {
            "num_key_value_heads": heads, "q_lora_rank": rng.choice([None, 16]), "kv_lora_rank": 24,
            "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 10, "n_routed_experts": 8,
            "n_shared_experts": rng.randrange(1, 3), "num_experts_per_tok": 3, "moe_intermediate_size": 16,
            "first_k_dense_replace": rng.randrange(0, 3), "n_group": 4, "topk_group": 2, "routed_scaling_factor": 1.7,
        }  # fmt: skip
        del values["head_dim"]
    if family == "deepseek_v3":
        values |= {"num_nextn_predict_layers": 0}  # transformers writes none
    if family == "deepseek_v2":
        values |= {"topk_method": rng.choice(["greedy", "group_limited_greedy"])}
    values["rope_parameters"] = dict(values["rope_parameters"])  # the class writes into it
    return getattr(transformers, CONFIGS[family])(**values)


def as_file(config: Any) -> dict[str, Any]:
    """What save_pretrained would write."""
    return json.loads(config.to_json_string(use_diff=False))


def count(config: Any) -> int:
    """Parameters of transformers' own model, tied tables once, and the balancing bias, which is a buffer there."""
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    shared = {id(p): p.numel() for p in model.parameters()}
    return sum(shared.values()) + sum(b.numel() for n, b in model.named_buffers() if n.endswith("correction_bias"))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("family", CONFIGS)
def test_a_spec_has_as_many_parameters_as_transformers_model(family: str, seed: int) -> None:
    config = random_config(family, seed)
    data = as_file(config)
    spec = read_config(data, "config.json").spec
    assert spec.num_params() - spec.mtp_params() == count(config)
    assert (spec.norm_eps, spec.context_length) == (config.rms_norm_eps, config.max_position_embeddings)
    assert spec.tie_embeddings == config.tie_word_embeddings
    wider = read_config(data | {"intermediate_size": data["intermediate_size"] + 8}, "config.json").spec
    sparse = all(isinstance(layer.ffn, MoE) for layer in spec.layers) and "moe_intermediate_size" in data
    assert (wider.num_params() == spec.num_params()) == sparse  # the twin


@pytest.mark.parametrize("family", CONFIGS)
def test_every_family_reads_the_defaults_of_its_class(family: str) -> None:
    config = getattr(transformers, CONFIGS[family])()
    data = as_file(config) | ({"num_experts_per_tok": 6} if family == "deepseek_v2" else {})  # None there
    if family == "deepseek_v3":
        data["num_nextn_predict_layers"] = 1
    spec = read_config(data, "config.json").spec
    assert len(spec.layers) == config.num_hidden_layers and spec.mtp == (family == "deepseek_v3")


def test_old_and_new_words_for_a_rotation_are_the_same() -> None:
    data = as_file(transformers.LlamaConfig(rope_parameters=LLAMA3, num_attention_heads=4, hidden_size=32))
    old = {k: v for k, v in data.items() if k != "rope_parameters"}
    old |= {"rope_theta": 5e5, "rope_scaling": {k: v for k, v in LLAMA3.items() if k != "rope_theta"}}
    old["rope_scaling"]["type"] = old["rope_scaling"].pop("rope_type")
    assert read_config(old, "old").spec == read_config(data, "new").spec


@pytest.mark.parametrize("rules", [PLAIN, YARN, LLAMA3], ids=lambda r: r["rope_type"])
def test_rotations_turn_as_fast_as_transformers(rules: dict[str, Any]) -> None:
    config = transformers.LlamaConfig(
        rope_parameters=rules, num_attention_heads=2, hidden_size=64, max_position_embeddings=256
    )
    theirs = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config).inv_freq
    gqa = read_config(as_file(config), "config.json").spec.mixers["gqa"]
    assert isinstance(gqa, GQA)
    torch.testing.assert_close(inverse_frequencies(gqa.rope), theirs)
    other = gqa.rope.model_copy(update={"theta": 4e5})
    assert not torch.allclose(inverse_frequencies(other), theirs)  # the twin


# ------------------------------------------------------------------------------------------ refusals
BASE = as_file(random_config("qwen3", 0))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"logit_softcap": 30.0}, "may change the maths and are not computed: logit_softcap"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' would change the maths; only 'silu' is computed"),
        ({"use_sliding_window": True}, "use_sliding_window = True"),
        ({"attention_bias": True}, "attention_bias"),
        ({"hidden_size": None, "hidden_sise": 32}, "no 'hidden_size'. Did you mean 'hidden_sise'"),
        ({"vocab_size": "many"}, "vocab_size: Input should be a valid integer"),
        ({"hidden_size": "wide"}, "a value of a wrong type"),
        ({"num_key_value_heads": 5}, r"heads \(\d+\) must be a multiple of kv_heads \(5\)"),
        ({"model_type": "qwen4"}, "'qwen4' is not known"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "'longrope' is not computed"),
        ({"rope_parameters": PLAIN | {"partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5"),
        ({"rope_parameters": PLAIN | {"spin": 2}}, "rope_scaling has keys that may change the maths"),
        ({"rope_parameters": YARN | {"attention_factor": 1.3}}, "attention_factor"),
    ],
)
def test_what_is_not_computed_is_refused(change: dict[str, Any], says: str) -> None:
    read_config(BASE | {"transformers_version": "9.9"}, "config.json")  # harmless
    with pytest.raises(UserError, match=says):
        read_config(BASE | change, "config.json")


def test_files_that_are_no_config(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    for text, says in (("{", "not valid JSON"), ("[1]", "holds a list"), ("{}", "model_type None")):
        path.write_text(text)
        with pytest.raises(UserError, match=says):
            read_config_file(path)
    with pytest.raises(UserError, match="can't be read"):
        read_config_file(tmp_path / "none.json")


# ------------------------------------------------------------------------------------ known by name
def test_minimax_m1_is_read_in_both_spellings() -> None:
    """The original file rotates half of a head, transformers' class all of it."""
    m1 = known_model("MiniMaxAI/MiniMax-M1-80k")
    assert m1 is not None
    gqa, lightning = m1.spec.mixers["gqa"], m1.spec.mixers["lightning"]
    assert isinstance(gqa, GQA) and gqa.rope.dims == 64 and isinstance(lightning, Lightning)
    assert [isinstance(layer.mixer, GQA) for layer in m1.spec.layers] == [i % 8 == 7 for i in range(80)]
    assert m1.spec.pattern == "(lightning/moe/linear*7 gqa/moe/softmax)*10"
    (note,) = read_config(as_file(random_config("minimax", 0)), "config.json").notes
    assert "every dimension" in note


def test_minimax_m2_is_read_in_both_spellings() -> None:
    """The original's words, and those that transformers writes for the same model."""
    m2, config = known_model("MiniMaxAI/MiniMax-M2"), transformers.MiniMaxM2Config(rotary_dim=64)
    assert m2 is not None and read_config(as_file(config), "config.json").spec == m2.spec
    gqa, moe = m2.spec.mixers["gqa"], m2.spec.ffns["moe"]
    assert isinstance(gqa, GQA) and gqa.rope.dims == 64 and gqa.qk_norm_over == "all"
    assert isinstance(moe, MoE) and moe.score == "sigmoid" and moe.selection_bias and moe.norm_topk
    original = catalog()["minimax-m2"]["config"] | {"attn_type_list": [1] * 62, "use_mtp": True, "num_mtp_modules": 3,
                "mtp_transformer_layers": 1, "shared_intermediate_size": 0}  # fmt: skip
    described = read_config(original, "config.json")
    assert described.spec == m2.spec and any("prediction modules" in note for note in described.notes)
    for change in ({"attn_type_list": [1, 0]}, {"qk_norm_type": "per_head"}, {"use_routing_bias": False}):
        with pytest.raises(UserError, match="would change the maths"):
            read_config(original | change, "config.json")


def test_qwen3_next_is_three_delta_rules_and_one_gated_attention() -> None:
    known = known_model("qwen3-next-80b-a3b-thinking")
    assert known is not None and known.spec.pattern == "(delta/moe*3 gqa/moe)*12" and known.spec.centred_norms
    gqa, delta = known.spec.mixers["gqa"], known.spec.mixers["delta"]
    assert isinstance(gqa, GQA) and gqa.rope.dims == 64 and gqa.out_gate
    assert isinstance(delta, GatedDeltaNet) and (delta.heads, delta.key_heads, delta.conv_width) == (32, 16, 8192)
    data = catalog()["qwen3-next-80b-a3b"]["config"]
    for change in (
        {"layer_types": ["sliding_attention"] * 48},
        {"mlp_only_layers": [0]},
        {"num_hidden_layers": 47, "layer_types": ["full_attention"]},
    ):
        with pytest.raises(UserError, match="would change the maths"):
            read_config(data | change, "config.json")


def test_v3_has_its_prediction_module_and_v2_its_groups() -> None:
    v3, v2 = known_model("deepseek-r1"), known_model("deepseek-ai/DeepSeek-V2-Chat")
    assert v3 is not None and v2 is not None
    assert v3.spec.mtp == 1 and v3.spec.mtp_params() == 11_610_068_224 and "fp8" in v3.notes[0]
    moe, mla = v2.spec.ffns["moe"], v2.spec.mixers["mla"]
    assert isinstance(moe, MoE) and (moe.groups, moe.top_groups, moe.group_score, moe.scale) == (8, 3, "max", 16.0)
    assert isinstance(mla, MLA) and mla.rope.yarn is not None and mla.rope.yarn.mscale_all_dim == 0.707


def test_names_are_found_in_any_spelling() -> None:
    assert known_model("Qwen3-8B") == known_model("qwen3-8b") == known_model("Qwen/Qwen3-8B") is not None
    assert known_model("qwen3-9b") is None
    for name in known_names():
        assert known_model(name) is not None and catalog()[name]["source"]
    with pytest.raises(UserError, match="published no architecture"):
        known_model("openai-o3")


def test_dual_chunks_are_read_and_what_differs_is_said() -> None:
    model = known_model("qwen2.5-7b-instruct-1m")
    assert model is not None and model.spec.context_length == 1_010_000 and "length as in vLLM" in model.notes[0]
    gqa = model.spec.mixers["gqa"]
    assert isinstance(gqa, GQA)
    assert gqa.chunks == DualChunks(chunk_size=262_144, local_size=8_192, original_length=262_144)
    config = catalog()["qwen2.5-7b-instruct-1m"]["config"]
    chunks = config["dual_chunk_attention_config"]
    sparse = read_config(config | {"dual_chunk_attention_config": chunks | {"sparse_attention_enabled": True}}, "x")
    assert "sparse prefill is not used" in sparse.notes[0] and sparse.spec == model.spec
    with pytest.raises(UserError, match="dual_chunk_attention_config.*not computed: stride"):
        read_config(config | {"dual_chunk_attention_config": chunks | {"stride": 2}}, "x")
    with pytest.raises(UserError, match="local_size .* must be below chunk_size"):
        read_config(config | {"dual_chunk_attention_config": chunks | {"local_size": 262_144}}, "x")
    plain = read_config({k: v for k, v in config.items() if k != "dual_chunk_attention_config"}, "x")
    assert plain.spec != model.spec and plain.notes == ()  # the twin


def test_every_family_is_tested() -> None:
    assert FAMILIES.keys() - CONFIGS.keys() == {"minimax_m1", "minimax_text_01"}  # transformers has no such class


@pytest.mark.parametrize(
    "pattern", ["a/b", "a/b*3", "a/b*2 c/d", "(a/b*7 c/d)*10", "(a/b c/d*2)*3", "a/b c/d a/b", "a/b*3 c/d*58"]
)
def test_patterns_are_written_as_they_are_read(pattern: str) -> None:
    names = expand_pattern(pattern)
    assert write_pattern(names) == pattern
    longer = copy.copy(names) + ["x/y"]
    assert expand_pattern(write_pattern(longer)) == longer
