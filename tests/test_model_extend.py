"""A context stretched at load time: the frequencies and temperatures are transformers', no weight changes, all is said."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from peers import randomise, twin
from test_cli_verbs import call, model  # noqa: F401  (a fixture)
from test_model_zoo import MIXERS, gap, noisy, spec_of, tokens_of
from trivet.config import UserError
from trivet.spec import GQA, MLA, DualChunks, Llama3Scaling, ModelSpec, Rope, with_chunks, with_yarn

transformers = pytest.importorskip("transformers")
SMALL = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 32, "pad_token_id": None, "bos_token_id": None,
    "eos_token_id": None, "tie_word_embeddings": False,
}  # fmt: skip
V3 = SMALL | {
    "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 24, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8,
    "v_head_dim": 10, "n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 3, "moe_intermediate_size": 16,
    "first_k_dense_replace": 1, "n_group": 4, "topk_group": 2, "num_nextn_predict_layers": 0,
}  # fmt: skip


def theirs(family: str, rope: dict[str, Any]) -> Any:
    rope = {"rope_theta": 10000.0} | rope
    torch.manual_seed(0)
    if family == "qwen3":
        found = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SMALL, head_dim=8, rope_parameters=rope))
    else:
        found = transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**V3, rope_parameters=rope))
    randomise(found)
    return found.eval()


@pytest.mark.parametrize("family", ["qwen3", "deepseek_v3"])
@torch.no_grad()
def test_yarn_at_load_time_is_a_config_with_yarn_from_the_start(family: str) -> None:
    """Against transformers, whose config says yarn; ours was loaded without it and stretched."""
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    if family == "deepseek_v3":
        yarn |= {"mscale": 1.0, "mscale_all_dim": 1.0}
    plain = twin(theirs(family, {"rope_type": "default"}))
    tokens = torch.randint(0, 61, (2, 100), generator=torch.Generator().manual_seed(1))
    want = theirs(family, yarn)(tokens).logits
    spec, said = with_yarn(plain.spec, 4)
    assert spec.context_length == 128 and "YaRN x4 takes the context from 32 to 128" in said
    ours = plain.with_spec(spec)
    assert gap(ours.logits(ours(tokens)), want) < 1e-4
    assert gap(plain.logits(plain(tokens)), want) > 1e-2  # the twin
    other = plain.with_spec(with_yarn(plain.spec, 5)[0])
    assert gap(other.logits(other(tokens)), want) > 1e-3
    assert all(
        a is b or a.data_ptr() == b.data_ptr() for a, b in zip(plain.parameters(), ours.parameters(), strict=True)
    )


def test_a_model_with_yarn_gets_the_new_factor_over_its_original_length() -> None:
    once, _ = with_yarn(spec_of("gqa/dense"), 2)
    assert with_yarn(once, 4)[0] == with_yarn(spec_of("gqa/dense"), 4)[0] != once


def test_window_lightning_and_positionless_layers_stay_and_are_named() -> None:
    spec = spec_of("gqa/dense window/dense lightning/dense nope/dense")
    for extend in (with_yarn, with_chunks):
        longer, said = extend(spec, 4)
        assert "nope, window, lightning layers stay" in said
        assert {n for n in spec.mixers if spec.mixers[n] != longer.mixers[n]} == {"gqa"}


@torch.no_grad()
def test_chunks_leave_the_start_alone_and_can_follow_yarn() -> None:
    spec = spec_of("gqa/dense*2").model_copy(update={"context_length": 16})
    plain = noisy(spec)
    longer, said = with_chunks(spec, 4)
    assert longer.context_length == 64 and "from 16 to 64" in said
    gqa = longer.mixers["gqa"]
    assert isinstance(gqa, GQA) and gqa.chunks == DualChunks(chunk_size=12, local_size=1, original_length=16)
    tokens = tokens_of(1, 64)
    want, got = plain(tokens), plain.with_spec(longer)(tokens)
    assert gap(got[:, :13], want[:, :13]) < 1e-5 and gap(got[:, 13:], want[:, 13:]) > 1e-3
    joined = with_chunks(with_yarn(spec, 2)[0], 2)[0]
    gqa = joined.mixers["gqa"]
    assert isinstance(gqa, GQA) and gqa.chunks == DualChunks(chunk_size=24, local_size=2) and gqa.rope.yarn is not None
    assert joined.context_length == 64


def llama3() -> ModelSpec:
    rope = Rope(dims=8, llama3=Llama3Scaling(factor=8, original_length=64, low_freq_factor=1, high_freq_factor=4))
    return spec_of("gqa/dense").model_copy(update={"mixers": {"gqa": GQA(heads=2, kv_heads=1, head_dim=8, rope=rope)}})


@pytest.mark.parametrize(
    ("extend", "spec", "factor", "says"),
    [
        (with_yarn, spec_of("gqa/dense"), 1.0, "factor above 1"),
        (with_chunks, spec_of("gqa/dense"), 0.5, "factor above 1"),
        (with_yarn, spec_of("lightning/dense nope/dense"), 4, "no layer has rotary positions"),
        (with_chunks, spec_of("window/dense"), 4, "no layer has rotary positions"),
        (with_yarn, spec_of("chunks/dense"), 4, "has dual chunks"),
        (with_chunks, spec_of("chunks/dense"), 4, "has dual chunks already"),
        (with_chunks, spec_of("mla/dense"), 4, "in GQA only"),
        (with_yarn, llama3(), 4, "Llama 3's rule already"),
    ],
)
def test_what_cannot_be_stretched_is_refused(extend: Any, spec: ModelSpec, factor: float, says: str) -> None:
    with pytest.raises(UserError, match=says):
        extend(spec, factor)


def test_mla_takes_its_temperature_on_the_whole_logit() -> None:
    mixer = with_yarn(spec_of("mla/dense"), 4)[0].mixers["mla"]
    assert isinstance(mixer, MLA) and mixer.rope.yarn is not None and mixer.rope.yarn.mscale_all_dim == 1.0
    assert MIXERS["mla"] != mixer


def test_a_user_stretches_a_model_and_is_told(
    model: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["eval", str(model), "--task", "chain", "-n", "2", "--max-tokens", "4", "--device", "cpu"]
    with pytest.warns(UserWarning, match="YaRN x4 takes the context from 96 to 384 tokens, untrained"):
        assert call(monkeypatch, capsys, *words, "--rope-yarn", "4")[0] == 0
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    chat = ["chat", str(model), "--dual-chunk", "2", "--device", "cpu"]
    with pytest.warns(UserWarning, match="Dual chunks take the context from 96 to 192"):
        assert call(monkeypatch, capsys, *chat)[0] == 0
    code, _, err = call(monkeypatch, capsys, *words, "--rope-yarn", "0.5")
    assert code == 1 and "factor above 1" in err
