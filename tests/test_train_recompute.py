"""Layers that are computed again in the backward pass: the same bits, and less kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from test_model_lora import adapted
from test_model_zoo import PATTERNS, noisy, spec_of, tokens_of
from test_rl_learner import CHAT, Digits, config, make
from trivet.model import Transformer, transformer
from trivet.model.lora import Size
from trivet.rl.learner import TIMES, learn
from trivet.train.data import Batch, Document, lay_out
from trivet.train.step import Precision, StepSums, backward


def batches() -> list[Batch]:
    """Two microbatches of two rows; the first has short documents, which attention takes apart."""
    documents = [Document(tokens_of(n, seed=n).tolist(), [True] * n) for n in (7, 5, 9, 25, 20, 24)]
    return [lay_out([documents[:3], documents[3:4]], 25), lay_out([documents[4:5], documents[5:]], 25)]


def step(
    pattern: str, recompute: bool, precision: Precision = "fp32", lora: bool = False
) -> tuple[dict[str, Tensor | None], StepSums]:
    model = noisy(spec_of(pattern, mtp=1))
    if lora:
        adapted(model, Size(3, 2.0, False))
    sums = backward(model, batches(), 0.3, precision, recompute)
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}, sums


def check_equal(pattern: str, precision: Precision = "fp32", lora: bool = False) -> None:
    plain, sums = step(pattern, False, precision, lora)
    again, same = step(pattern, True, precision, lora)
    assert all(grad is not None and bool(grad.any()) for name, grad in plain.items() if not name.endswith("bias"))
    for name, grad in plain.items():
        assert grad is not None
        torch.testing.assert_close(again[name], grad, rtol=0, atol=0, msg=name)
    assert torch.equal(same.loss, sums.loss) and torch.equal(same.balance, sums.balance)
    assert len(same.loads) == len(sums.loads) and all(map(torch.equal, same.loads, sums.loads))  # counted once


@pytest.mark.parametrize("pattern", sorted({PATTERNS[name] for name in ("post", "dual", "hybrid", "gated")}))
def test_gradients_are_equal_to_the_bit(pattern: str) -> None:
    check_equal(pattern)
    check_equal(pattern, "bf16")


@pytest.mark.parametrize("name", ["hybrid", "gated"])
def test_gradients_of_adapters_are_equal_to_the_bit(name: str) -> None:
    check_equal(PATTERNS[name], lora=True)
    check_equal(PATTERNS[name], "bf16", lora=True)


def test_a_layer_that_is_not_the_same_twice_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin: with dropout, the second run of a layer is another one."""
    plain = transformer.Layer.forward

    def forgetful(self: nn.Module, stream: Any, *rest: Any) -> Any:
        x, r = plain(self, stream, *rest)  # type: ignore[arg-type]
        return nn.functional.dropout(x, 0.2), r

    monkeypatch.setattr(transformer.Layer, "forward", forgetful)
    with pytest.raises(AssertionError):
        torch.manual_seed(0)
        check_equal("gqa/dense*2")


def kept(model: Transformer, recompute: bool) -> int:
    """Bytes that a forward pass leaves for the backward pass, weights not counted."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        found[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(tokens_of(2, 40), torch.arange(40).expand(2, -1), recompute=recompute)
    return sum(t.untyped_storage().nbytes() for at, t in found.items() if at not in weights)


def test_only_the_stream_between_layers_is_kept() -> None:
    model = noisy(spec_of("gqa/dense lightning/moe mla/dense"))
    stream = 2 * 40 * model.spec.d_model * 4
    assert 5 * stream < kept(model, True) < 8 * stream  # three layers, the final norm's input; positions, indices
    assert kept(model, False) > 60 * stream


def test_rl_learns_the_same_with_it(tmp_path: Path) -> None:
    def run(recompute: bool, out: str) -> tuple[list[Tensor], dict[str, Any]]:
        model = make("gqa/moe lightning/dense", noise=0.3)  # a later update replays its experts
        more = config(epochs=2, muon_lr=0.01, recompute=recompute)
        last = learn(model, CHAT, [(Digits(), 1.0)], more, tmp_path / out)
        return [p.detach() for p in model.parameters()], {k: v for k, v in last.items() if k not in TIMES}

    (plain, said), (again, same) = run(False, "plain"), run(True, "again")
    assert all(map(torch.equal, plain, again)) and said == same
    assert not all(map(torch.equal, plain, make("gqa/moe lightning/dense", noise=0.3).parameters()))
