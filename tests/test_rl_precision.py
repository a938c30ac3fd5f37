"""RL in bf16: what stays in fp32, and what that is worth to the agreement of sampler and trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from test_rl_learner import CHAT, Calls, Digits, config, make
from trivet.model import Routing, Transformer
from trivet.rl.learner import _Run, learn
from trivet.rl.precision import sampling_model


def with_offset(pattern: str, tied: bool = False) -> Transformer:
    """A model whose logits have a large part in common, as those of trained models do; softmax does not see it."""
    model = make(pattern, noise=0.3)
    if tied:
        model = Transformer(model.spec.model_copy(update={"tie_embeddings": True}), seed=3)
    common = torch.randn(16, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        model.embed += (0.5 if tied else 8) * common
        if model.head is not None:
            model.head += common / 2
    return model


def one_step(model: Transformer, **changes: Any) -> dict[str, Any]:
    settings = config(problems=16, precision="bf16", muon_lr=0, adam_lr=0, **changes)
    return _Run(model, CHAT, [(Digits(), 1.0)], settings, Path("nowhere"), "cpu").one_step(0)


@pytest.mark.parametrize("pattern", ["gqa/dense*2", "mla/dense*2"])
def test_a_head_in_fp32_brings_sampler_and_trainer_together(pattern: str) -> None:
    model = with_offset(pattern)
    exact, rounded = (one_step(model, fp32_head=head) for head in (True, False))
    assert 0 < exact["mismatch/kl"] < rounded["mismatch/kl"] / 2  # a fifth
    assert exact["mismatch/kl"] < 1e-3  # the default limit of a run
    assert 1 - exact["mismatch/correlation"] < (1 - rounded["mismatch/correlation"]) / 2


def test_the_sampler_shares_what_stays_exact() -> None:
    for model in (make("gqa/moe mla/dense", noise=0.3), with_offset("gqa/moe*2", tied=True)):
        assert sampling_model(model, config()) is model
        before = {name: p.clone() for name, p in model.named_parameters()}
        copied = sampling_model(model, config(precision="bf16"))
        kinds = {name: p.dtype for name, p in copied.named_parameters()}
        exact = {name for name, kind in kinds.items() if kind == torch.float32}
        assert exact == {"head", *(name for name in kinds if name.endswith(".router"))}
        assert copied.head_weight.data_ptr() == model.head_weight.data_ptr()
        assert sampling_model(model, config(precision="bf16", fp32_head=False)).head_weight.dtype == torch.bfloat16
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
        assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())
        tokens = torch.randint(CHAT.vocab_size, (2, 9), generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            hidden = copied(tokens)
            assert hidden.dtype == torch.bfloat16 and copied.logits(hidden).dtype == torch.float32
            want = model.logits(model(tokens)).log_softmax(-1)
            apart = (copied.logits(hidden).log_softmax(-1) - want).abs().max()
        assert 0 < apart < 0.5


@pytest.mark.parametrize("recompute", [False, True])
def test_ratios_of_a_first_epoch_are_one_to_the_bit_in_bf16_too(recompute: bool, tmp_path: Path) -> None:
    settings = config(
        problems=8, precision="bf16", replay="sampler", epochs=2, minibatches=2, muon_lr=0, adam_lr=0, objective="grpo",
        recompute=recompute, top_p=0.9, mismatch_limit=0.1,
    )  # fmt: skip
    pattern = "lightning/moe delta/dense gqa/moe mla/moe"
    last = learn(make(pattern, noise=0.3), CHAT, [(Calls(), 1.0)], settings, tmp_path)
    assert last["ratio/max_abs_log"] == last["ratio/last_max_abs_log"] == 0.0
    assert 1e-3 < last["mismatch/max_abs_log"] and last["grad_norm"] > 0  # it was rounded
    assert 0.9 < last["routing/agreement"] <= 1


def test_rounding_may_explain_more_in_bf16() -> None:
    assert config().most_mismatch == 1e-3 < config(precision="bf16").most_mismatch == 1e-2
    assert config(precision="bf16", mismatch_limit=1e-4).most_mismatch == 1e-4


def test_weights_and_what_is_learnt_are_fp32(tmp_path: Path) -> None:
    logged: list[float] = []
    settings = config(steps=24, problems=8, group=8, muon_lr=0.02, adam_lr=0.05, precision="bf16")
    model = make()
    learn(model, CHAT, [(Digits(), 1.0)], settings, tmp_path, progress=lambda line: logged.append(line["reward"]))
    assert sum(logged[-3:]) / 3 > sum(logged[:3]) / 3 + 0.3
    assert all(p.dtype == torch.float32 for p in model.parameters())
    run = _Run(model, CHAT, [(Digits(), 1.0)], config(precision="bf16"), tmp_path / "b", "cpu")
    rows = [a.row for a in run.sampler.sample(0).attempts if any(a.row.trained)]
    part = run.updates.minibatch(rows, range(len(rows)), torch.ones(len(rows))).parts[0]
    logp = run.updates.logprobs(model, part, Routing())[0]
    logp.sum().backward()
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in model.parameters())
