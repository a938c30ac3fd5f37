"""A spec as a config.json: what a reader makes of it is the spec again, and transformers computes the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from test_hub_configs import CONFIGS, as_file, random_config
from test_model_zoo import PATTERNS, gap, spec_of
from trivet.config import UserError
from trivet.hub import FAMILIES, known_model, known_names, read_config
from trivet.hub.checkpoint import save_checkpoint
from trivet.hub.pairs import in_pairs, spec_in_pairs
from trivet.hub.write import CLASSES, differences, write_config
from trivet.model import Transformer
from trivet.spec import GQA, MLA, GatedDeltaNet, Llama3Scaling, ModelSpec, MoE, Rope, SwiGLU, Yarn

transformers = pytest.importorskip("transformers")
from peers import randomise  # noqa: E402


def meaning(spec: ModelSpec) -> Any:
    return [spec.layers, spec.model_dump(exclude={"pattern", "mixers", "ffns", "residuals"})]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("family", CONFIGS)
def test_what_was_read_is_written_and_read_again(family: str, seed: int) -> None:
    spec = read_config(as_file(random_config(family, seed)), "config.json").spec
    written = write_config(spec, family)
    back = read_config(json.loads(json.dumps(written)), "written").spec
    assert meaning(back) == meaning(spec)
    assert written["architectures"] == [CLASSES[family]] and write_config(spec)["model_type"] in CLASSES
    wider = read_config(written | {"hidden_size": spec.d_model * 2}, "written").spec
    assert any("d_model" in d for d in differences(wider, spec))  # the twin


@pytest.mark.parametrize("name", known_names())
def test_known_models_are_written_by_their_own_family(name: str) -> None:
    described = known_model(name)
    assert described is not None
    back = read_config(write_config(described.spec, described.family), name).spec
    assert meaning(back) == meaning(described.spec)


def test_every_family_has_a_class() -> None:
    assert CLASSES.keys() == FAMILIES.keys()


ROPE = Rope(dims=8, theta=5e4)
GATED = GQA(heads=4, kv_heads=2, head_dim=16, rope=ROPE, qk_norm=True, out_gate=True)
DELTA = GatedDeltaNet(heads=4, key_heads=2, key_dim=6, value_dim=5, conv=3)
SHARED = MoE(experts=6, top_k=2, hidden=16, shared_hidden=24, shared_gate=True, score="softmax", selection_bias=False)
JOINT = GQA(heads=4, kv_heads=2, head_dim=8, rope=Rope(dims=4, theta=5e4), qk_norm=True, qk_norm_over="all")
OWN: dict[str, ModelSpec] = {
    "llama": spec_of("gqa/dense*2"),
    "qwen3": ModelSpec(
        vocab_size=48, d_model=24, pattern="a/b*2", tie_embeddings=False, norm_eps=1e-5, context_length=64,
        mixers={"a": GQA(heads=4, kv_heads=2, head_dim=8, rope=ROPE, qk_norm=True)}, ffns={"b": SwiGLU(hidden=40)},
    ),
    "llama, llama3": ModelSpec(
        vocab_size=48, d_model=24, pattern="a/b*2", context_length=64, ffns={"b": SwiGLU(hidden=40)},
        mixers={"a": GQA(heads=4, kv_heads=2, head_dim=8, rope=ROPE.model_copy(update={"llama3": Llama3Scaling(
            factor=8.0, original_length=16, low_freq_factor=1.0, high_freq_factor=4.0)}))},
    ),
    "qwen2, yarn": ModelSpec(
        vocab_size=48, d_model=32, pattern="a/b*2", context_length=64, ffns={"b": SwiGLU(hidden=40)},
        mixers={"a": GQA(heads=4, kv_heads=2, head_dim=8, qkv_bias=True, rope=ROPE.model_copy(update={"yarn": Yarn(
            factor=4.0, original_length=16, beta_fast=4.0)}))},
    ),
    "qwen3_moe": ModelSpec(
        vocab_size=48, d_model=24, pattern="a/b*2", context_length=64,
        mixers={"a": GQA(heads=4, kv_heads=2, head_dim=8, rope=ROPE, qk_norm=True)},
        ffns={"b": MoE(experts=6, top_k=2, hidden=16, score="softmax", norm_topk=False, selection_bias=False)},
    ),
    "mixtral": ModelSpec(
        vocab_size=48, d_model=32, pattern="a/b*2", context_length=64,
        mixers={"a": GQA(heads=4, kv_heads=2, head_dim=8, rope=ROPE)},
        ffns={"b": MoE(experts=6, top_k=2, hidden=16, score="softmax", selection_bias=False, balance=0.01)},
    ),
    "deepseek_v3": ModelSpec(
        vocab_size=48, d_model=32, pattern="a/c a/b*2", context_length=64,
        mixers={"a": MLA(heads=3, kv_rank=10, nope_dim=6, v_dim=7, rope=Rope(dims=4, interleaved=True))},
        ffns={"b": MoE(experts=8, top_k=2, hidden=16, shared_hidden=32, scale=1.5, groups=4, top_groups=2),
              "c": SwiGLU(hidden=24)},
    ),
    "qwen3_next": ModelSpec(
        vocab_size=48, d_model=24, pattern="d/b*2 a/b", context_length=64, centred_norms=True,
        mixers={"a": GATED, "d": DELTA}, ffns={"b": SHARED},
    ),
    "qwen3_next, only linear": ModelSpec(
        vocab_size=48, d_model=24, pattern="d/b*2", context_length=64, centred_norms=True, mixers={"d": DELTA}, ffns={"b": SHARED},
    ),
    "minimax_m2": ModelSpec(
        vocab_size=48, d_model=24, pattern="a/b*2", context_length=64, mixers={"a": JOINT},
        ffns={"b": MoE(experts=6, top_k=2, hidden=16)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("tied", [True, False])
def test_transformers_computes_what_our_own_spec_computes(name: str, tied: bool, tmp_path: Path) -> None:
    """No checkpoint of theirs was there before: only our spec, and the words for it."""
    spec = OWN[name].model_copy(update={"tie_embeddings": tied})
    ours = Transformer(spec)
    randomise(ours)
    config = write_config(spec)
    assert config["model_type"] == name.partition(",")[0]
    save_checkpoint(ours, tmp_path, config)
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    tokens = torch.randint(0, spec.vocab_size, (2, 40), generator=torch.Generator().manual_seed(1))
    want = ours.logits(ours(tokens))
    assert gap(theirs(tokens, use_cache=False).logits, want) < 1e-4 and want.std() > 0.05
    with torch.no_grad():
        ours.layers[0].mixer.o_proj.weight *= 1.02  # type: ignore[union-attr]
    assert gap(theirs(tokens, use_cache=False).logits, ours.logits(ours(tokens))) > 2e-4  # the twin


GQA_SPEC = OWN["qwen3"]


def changed(spec: ModelSpec, **traits: Any) -> ModelSpec:
    mixer = spec.mixers["a"].model_copy(update=traits)
    return spec.model_copy(update={"mixers": {**spec.mixers, "a": mixer}})


NEXT, M2 = OWN["qwen3_next"], OWN["minimax_m2"]


@pytest.mark.parametrize(
    ("spec", "family", "says"),
    [
        (GQA_SPEC, "llama", "layer 0's mixer.qk_norm is True and not False"),
        (changed(GQA_SPEC, window=8), "qwen3", "layer 0's mixer.window is 8 and not None"),
        (changed(GQA_SPEC, window=8), None, "qwen3 is the nearest, but layer 0's mixer.window is 8 and not None"),
        (changed(GQA_SPEC, rope=Rope(dims=4)), "qwen3", "layer 0's mixer.rope.dims is 4 and not 8"),
        (changed(GQA_SPEC, rope=ROPE), "deepseek_v3", "As deepseek_v3, this model has no 'moe_intermediate_size'.$"),
        (spec_of("mla/moe"), "deepseek_v3", "layer 0's ffn.shared_hidden is 8 and not 0"),
        (spec_of("mla/moe"), "qwen3_moe", "layer 0's mixer is mla and not gqa"),
        (
            OWN["deepseek_v3"].model_copy(update={"pattern": "a/b a/c"}),
            "deepseek_v3",
            "layer 1's ffn is swiglu and not moe",
        ),
        (spec_of("gqa/dense", mtp=1), "llama", "its mtp is 1 and not 0"),
        (spec_of("gqa/dense"), "lama", "No family 'lama'.*Did you mean 'llama'"),
        (spec_of(PATTERNS["hybrid"]), None, "No family's config can say this model"),
        (NEXT.model_copy(update={"centred_norms": False}), "qwen3_next", "its centred_norms is False and not True"),
        (
            changed(NEXT, out_gate=False),
            None,
            "qwen3_next is the nearest, but layer 2's mixer.out_gate is False and not",
        ),
        (NEXT.model_copy(update={"mtp": 2}), "qwen3_next", "its mtp is 2 and not 1"),
        (
            NEXT.model_copy(update={"ffns": {"b": SwiGLU(hidden=40)}}),
            None,
            "this model. As qwen3_next, this model has no 'num_experts'.$",
        ),
        (
            NEXT.model_copy(update={"ffns": {"b": MoE(experts=6, top_k=2, hidden=16)}}),
            None,
            "As qwen3_next, this model: Value error, shared_gate needs a shared expert",
        ),
        (NEXT, "minimax", "As minimax, this model: partial_rotary_factor = 0.5 would change the maths"),
        (changed(M2, qk_norm_over="head"), "minimax_m2", "layer 0's mixer.qk_norm_over is head and not all"),
        (changed(M2, qk_norm_over="head"), None, "minimax_m2 is the nearest, but layer 0's mixer.qk_norm_over is head"),
        (M2.model_copy(update={"mtp": 1}), "minimax_m2", "its mtp is 1 and not 0"),
    ],
)
def test_what_a_family_has_no_words_for_is_named(spec: ModelSpec, family: str | None, says: str) -> None:
    with pytest.raises(UserError, match=says):
        write_config(spec, family)


def test_how_a_router_was_trained_is_not_the_models_business() -> None:
    spec = OWN["mixtral"]
    other = spec.model_copy(update={"ffns": {"b": spec.ffns["b"].model_copy(update={"bias_rate": 0.5})}})
    assert not list(differences(spec, other))
    other = spec.model_copy(update={"ffns": {"b": spec.ffns["b"].model_copy(update={"scale": 2.0})}})
    assert list(differences(spec, other))


@pytest.mark.parametrize("q_rank", [None, 12])
@pytest.mark.parametrize("yarn", [None, Yarn(factor=4.0, original_length=16, beta_fast=4.0, mscale_all_dim=1.0)])
def test_a_rotation_of_halves_is_written_in_pairs(q_rank: int | None, yarn: Yarn | None, tmp_path: Path) -> None:
    """transformers reads `rope_interleave`, others take pairs for granted: the weights say it, not a switch."""
    mla = MLA(heads=3, kv_rank=10, q_rank=q_rank, nope_dim=6, v_dim=7, rope=Rope(dims=8, yarn=yarn))
    spec = OWN["deepseek_v3"].model_copy(update={"mixers": {"a": mla}, "mtp": 1})
    ours = Transformer(spec)
    randomise(ours)
    made = in_pairs(ours)
    assert made.spec == spec_in_pairs(spec) != spec and in_pairs(made) is made
    tokens = torch.randint(0, spec.vocab_size, (2, 40), generator=torch.Generator().manual_seed(1))
    hidden = ours(tokens)
    assert gap(made(tokens), hidden) < 1e-5
    assert gap(made.mtp_hidden(made(tokens), tokens)[0], ours.mtp_hidden(hidden, tokens)[0]) < 1e-5
    config = write_config(made.spec)
    assert config["rope_interleave"] is True
    save_checkpoint(made, tmp_path, config)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert gap(theirs(tokens).logits, ours.logits(hidden)) < 1e-4
    with torch.device("meta"):
        mistaken = Transformer(made.spec, seed=None)
    mistaken.load_state_dict(ours.state_dict(), assign=True)
    assert gap(mistaken(tokens), hidden) > 1e-2  # the twin: the switch without the rows
