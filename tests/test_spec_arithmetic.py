"""The arithmetic of a spec gives the published figures; a pattern says where it stops making sense."""

from __future__ import annotations

import subprocess
import sys

import pytest
from pydantic import ValidationError

from trivet.spec import (
    GQA,
    MLA,
    DualResidual,
    Lightning,
    ModelSpec,
    MoE,
    PostNorm,
    PreNorm,
    Rope,
    SwiGLU,
    Yarn,
)
from trivet.spec.pattern import expand_pattern

YARN = Yarn(factor=40, original_length=4096, mscale_all_dim=1.0)


def deepseek_v3(mtp: int = 0) -> ModelSpec:
    return ModelSpec(
        vocab_size=129280, d_model=7168, pattern="mla/dense*3 mla/moe*58", tie_embeddings=False, mtp=mtp,
        mixers={"mla": MLA(heads=128, kv_rank=512, q_rank=1536, nope_dim=128, v_dim=128,
                           rope=Rope(dims=64, interleaved=True, yarn=YARN))},
        ffns={"dense": SwiGLU(hidden=18432),
              "moe": MoE(experts=256, top_k=8, hidden=2048, shared_hidden=2048, scale=2.5, groups=8, top_groups=4)},
    )  # fmt: skip


def deepseek_v2(lite: bool) -> ModelSpec:
    mla = MLA(heads=16 if lite else 128, kv_rank=512, q_rank=None if lite else 1536, nope_dim=128, v_dim=128,
              rope=Rope(dims=64, interleaved=True))  # fmt: skip
    moe = MoE(experts=64 if lite else 160, top_k=6, hidden=1408 if lite else 1536, score="softmax", norm_topk=False,
              shared_hidden=2 * (1408 if lite else 1536), selection_bias=False)  # fmt: skip
    return ModelSpec(
        vocab_size=102400, d_model=2048 if lite else 5120, tie_embeddings=False, mixers={"mla": mla},
        pattern="mla/dense mla/moe*26" if lite else "mla/dense mla/moe*59",
        ffns={"dense": SwiGLU(hidden=10944 if lite else 12288), "moe": moe},
    )  # fmt: skip


def minimax_m1() -> ModelSpec:
    return ModelSpec(
        vocab_size=200064, d_model=6144, pattern="(lightning/moe/post*7 gqa/moe/post)*10", tie_embeddings=False,
        mixers={"gqa": GQA(heads=64, kv_heads=8, head_dim=128, rope=Rope(dims=64, theta=1e7)),
                "lightning": Lightning(heads=64, head_dim=128)},
        ffns={"moe": MoE(experts=32, top_k=2, hidden=9216, score="softmax", selection_bias=False)},
        residuals={"post": PostNorm(mixer_alpha=160**0.25, ffn_alpha=160**0.25)},
    )  # fmt: skip


def qwen3(layers: int, d: int, hidden: int, heads: int, kv: int, tied: bool = False, moe: bool = False) -> ModelSpec:
    ffn = (
        MoE(experts=128, top_k=8, hidden=hidden, score="softmax", selection_bias=False)
        if moe
        else SwiGLU(hidden=hidden)
    )
    return ModelSpec(
        vocab_size=151936, d_model=d, pattern=f"gqa/ffn*{layers}", tie_embeddings=tied, ffns={"ffn": ffn},
        mixers={"gqa": GQA(heads=heads, kv_heads=kv, head_dim=128, qk_norm=True, rope=Rope(dims=128, theta=1e6))},
    )  # fmt: skip


PUBLISHED = {
    "DeepSeek-V3": (deepseek_v3(), 671_026_419_200, 70_272, None),
    "DeepSeek-V2": (deepseek_v2(lite=False), 235_741_434_880, 69_120, None),
    "DeepSeek-V2-Lite": (deepseek_v2(lite=True), 15_706_484_224, 31_104, 2_661_150_208),
    "MiniMax-M1": (minimax_m1(), 456_089_655_296, 40_960, 45_944_920_064 + 2 * 200064 * 6144),
    "Qwen3-0.6B": (qwen3(28, 1024, 3072, 16, 8, tied=True), 596_049_920, 114_688, 596_049_920),
    "Qwen3-1.7B": (qwen3(28, 2048, 6144, 16, 8, tied=True), 1_720_574_976, 114_688, 1_720_574_976),
    "Qwen3-4B": (qwen3(36, 2560, 9728, 32, 8, tied=True), 4_022_468_096, 147_456, 4_022_468_096),
    "Qwen3-8B": (qwen3(36, 4096, 12288, 32, 8), 8_190_735_360, 147_456, 8_190_735_360),
    "Qwen3-14B": (qwen3(40, 5120, 17408, 40, 8), 14_768_307_200, 163_840, 14_768_307_200),
    "Qwen3-32B": (qwen3(64, 5120, 25600, 64, 8), 32_762_123_264, 262_144, 32_762_123_264),
    "Qwen3-30B-A3B": (qwen3(48, 2048, 768, 32, 4, moe=True), 30_532_122_624, 98_304, None),
    "Qwen3-235B-A22B": (qwen3(94, 4096, 1536, 64, 4, moe=True), 235_093_634_560, 192_512, None),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_figures(name: str) -> None:
    spec, total, cache, active = PUBLISHED[name]
    assert spec.num_params() == total
    assert spec.cache_bytes_per_token() == cache
    if active is not None:
        assert spec.active_params() == active


@pytest.mark.parametrize(
    ("name", "billions"), [("DeepSeek-V3", 37.552), ("Qwen3-30B-A3B", 3.353), ("Qwen3-235B-A22B", 22.191)]
)
def test_published_active_parameters(name: str, billions: float) -> None:
    assert PUBLISHED[name][0].active_params() / 1e9 == pytest.approx(billions, abs=0.0006)


def test_one_mtp_module_of_v3() -> None:
    unique = deepseek_v3(mtp=1).num_params() - deepseek_v3().num_params()
    assert unique == pytest.approx(11.6e9, rel=0.01) and unique == 11_610_068_224
    assert deepseek_v3(mtp=1).active_params() == deepseek_v3().active_params()


def test_minimax_state_and_work() -> None:
    spec = minimax_m1()
    assert spec.state_bytes(4) == 4 * 73_400_320
    assert spec.state_bytes(2) == pytest.approx(146.8e6, rel=1e-3)
    # 10 softmax layers grow with the context, 70 lightning layers do not
    assert spec.flops_per_token(2000) - spec.flops_per_token(1000) == 10 * 64 * 128 * 4 * 1000
    assert spec.flops_per_token(0) - 2 * (spec.active_params() - _vectors(spec)) == (
        70 * 64 * 4 * 128 * 128 - 2 * spec.vocab_size * spec.d_model  # the input table is a look-up
    )


def _vectors(spec: ModelSpec) -> int:
    return (2 * 80 + 1) * spec.d_model + 70 * 64 * 128  # norms: none of a layer's matrix products


def test_work_of_attention_forms() -> None:
    mla = deepseek_v3().mixers["mla"]
    assert isinstance(mla, MLA)
    assert mla.context_flops(1) == 81_920 and mla.absorbed_flops(1) == 278_528
    window = GQA(heads=4, kv_heads=2, head_dim=8, rope=Rope(dims=8), window=100)
    assert window.context_flops(1000) == window.context_flops(100) == 10 * window.context_flops(10)


def test_training_work_is_three_forwards_of_the_mean_context() -> None:
    spec = qwen3(2, 64, 128, 2, 1)
    assert spec.training_flops_per_token(1023) == 3 * spec.flops_per_token(512)
    assert spec.training_flops_per_token(2047) > spec.training_flops_per_token(1023)


def test_planning_imports_no_torch() -> None:
    code = "import sys, trivet.spec; raise SystemExit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


# -------------------------------------------------------------------------------------------- patterns
@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("a/b", ["a/b"]),
        ("a/b*3", ["a/b"] * 3),
        ("a/b * 2 c/d", ["a/b", "a/b", "c/d"]),
        ("(a/b*2 c/d)*2", ["a/b", "a/b", "c/d"] * 2),
        ("((a/b c/d/r)*2 e/f)*2 g/h", (["a/b", "c/d/r"] * 2 + ["e/f"]) * 2 + ["g/h"]),
        ("(a/b)", ["a/b"]),
    ],
)
def test_patterns_expand(pattern: str, names: list[str]) -> None:
    assert expand_pattern(pattern) == names


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ("", "names no layer"),
        ("()", "names no layer"),
        ("a/b*0", "names no layer"),
        ("(a/b", "never closed"),
        ("a/b)", "without its"),
        ("a", "'a' should read mixer/ffn"),
        ("a/b/c/d", "'a/b/c/d' should read"),
        ("a/b c/d *", r"'\*' should read"),
        ("*2 a/b", r"'\*2' should read"),
        ("a/b**2", r"'\*' should read"),
        ("a/b*2*3", r"'\*3' should read"),
        ("a/b*-1", "should read"),
    ],
)
def test_a_bad_pattern_says_where(pattern: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        expand_pattern(pattern)


SMALL = {
    "vocab_size": 8,
    "d_model": 8,
    "pattern": "gqa/dense",
    "mixers": {"gqa": {"kind": "gqa", "heads": 4, "kv_heads": 2, "head_dim": 8, "rope": {"dims": 8}}},
    "ffns": {"dense": {"kind": "swiglu", "hidden": 8}},
}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"pattern": "gqb/dense"}, "no 'gqb' in mixers; did you mean 'gqa'"),
        ({"pattern": "gqa/danse"}, "no 'danse' in ffns; did you mean 'dense'"),
        ({"pattern": "/dense"}, "no '' in mixers"),
        ({"pattern": "gqa/"}, "no '' in ffns"),
        ({"pattern": "gqa//pre"}, "no '' in ffns"),
        ({"pattern": "gqa/dense/"}, "no '' in residuals"),
        ({"pattern": "gqa/dense/dual"}, "no 'dual' in residuals"),
        ({"pattern": "gqa/dense gqa/dense/d", "residuals": {"d": {"kind": "dual"}}}, "in every layer"),
        ({"rope_theta": 3}, "Extra inputs"),
    ],
)
def test_a_spec_that_does_not_resolve_is_refused(change: dict, says: str) -> None:
    ModelSpec.model_validate(SMALL)
    with pytest.raises(ValidationError, match=says):
        ModelSpec.model_validate(SMALL | change)


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda: Rope(dims=3), "even"),
        (lambda: GQA(heads=4, kv_heads=3, head_dim=8, rope=Rope(dims=8)), "multiple of kv_heads"),
        (lambda: GQA(heads=4, kv_heads=2, head_dim=8, rope=Rope(dims=10)), "exceeds head_dim"),
        (lambda: MoE(experts=6, top_k=2, hidden=8, groups=4), "divide into groups"),
        (lambda: MoE(experts=8, top_k=2, hidden=8, groups=4, top_groups=5), "exceeds groups"),
        (lambda: MoE(experts=8, top_k=3, hidden=8, groups=8, top_groups=2, group_score="max"), "top_k"),
        (lambda: MoE(experts=8, top_k=2, hidden=8, groups=8, top_groups=2), "top2"),
        (lambda: MoE(experts=8, top_k=0, hidden=8), "greater than 0"),
        (lambda: MoE(experts=8, top_k=2, hidden=8, groups=0), "greater than 0"),
    ],
)
def test_parts_that_do_not_fit_are_refused(build: object, says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        build()  # type: ignore[operator]


def test_a_spec_is_a_value() -> None:
    spec = minimax_m1()
    again = ModelSpec.model_validate_json(spec.model_dump_json())
    assert again == spec and again.layers == spec.layers
    with pytest.raises(ValidationError):
        spec.d_model = 3  # type: ignore[misc]
    assert isinstance(qwen3(1, 8, 8, 1, 1).layers[0].residual, PreNorm)
    dual = ModelSpec.model_validate(SMALL | {"pattern": "gqa/dense/d", "residuals": {"d": {"kind": "dual"}}})
    assert dual.layers[0].residual == DualResidual()
