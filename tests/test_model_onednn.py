"""Products by oneDNN are the products: alone, in groups, in attention and in whole models."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from test_model_zoo import PATTERNS, gap, noisy, spec_of, tokens_of
from trivet.model import onednn
from trivet.model.ffn import sorted_
from trivet.model.prefill import prefill
from trivet.train.losses import head_loss, token_logprobs

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="no oneDNN in this PyTorch")


@pytest.fixture(autouse=True)
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "LEAST", 1)
    monkeypatch.setattr(onednn, "faster", lambda: True)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def test_products_are_those_in_double_precision() -> None:
    x, w, bias = normal(2, 70, 96), normal(40, 96, seed=1), normal(40, seed=2)
    got = onednn.linear(x, w, bias)
    want = (x.double() @ w.double().T + bias).float()
    assert gap(got, want) < 1e-5
    for view in (x[:, :, 1:], x.transpose(0, 1).contiguous().transpose(0, 1)[..., 1:]):
        moved = onednn.linear(view, w.T.contiguous().T[:, 1:])
        assert gap(moved, (view.double() @ w.double()[:, 1:].T).float()) < 1e-5
    w[3, 5] += 1
    assert gap(got, (x.double() @ w.double().T + bias).float()) > 1e-2  # the twin
    a, b = normal(3, 9, 17), normal(3, 11, 17, seed=1)
    for other in (b.mT, b.mT.contiguous()):
        both = onednn.matmul(a, other)
        assert both is not None and gap(both, (a.double() @ other.double()).float()) < 1e-5


def test_what_has_gaps_is_copied_and_nothing_else() -> None:
    x = normal(6, 8)
    for whole in (x, x.T, x[2:5], x.T[:, 2:5]):
        assert onednn.dense(whole) is whole
    for gaps in (x[:, :5], x[::2], x.T[:3]):
        assert onednn.dense(gaps).is_contiguous() and torch.equal(onednn.dense(gaps), gaps)


@torch.inference_mode()
def test_a_row_does_not_depend_on_its_neighbours() -> None:
    x, w = normal(300, 96), normal(40, 96, seed=1)
    whole = onednn.linear(x, w)
    for n in (2, 7, 33, 64, 100, 299):
        some = onednn.linear(x[:n].clone(), w)
        assert torch.equal(some, whole[:n])


@torch.inference_mode()
def test_groups_and_experts() -> None:
    x, w = normal(20, 16), normal(4, 24, 16, seed=1)
    got = onednn.grouped(x, w, torch.tensor([5, 5, 12, 20]))
    group = torch.tensor([0] * 5 + [2] * 7 + [3] * 8)
    assert got is not None and gap(got, (w[group] @ x.unsqueeze(-1)).squeeze(-1)) < 1e-5
    chosen = torch.randint(0, 4, (20, 2), generator=torch.Generator().manual_seed(0))
    gate_up, down = normal(4, 2, 8, 16, seed=2), normal(4, 8, 16, seed=3)
    ours = sorted_(x, chosen, normal(20, 2), gate_up, down)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onednn, "faster", lambda: False)
        theirs = sorted_(x, chosen, normal(20, 2), gate_up, down)
    assert gap(ours, theirs) < 1e-5
    assert gap(ours, sorted_(x, chosen.flip(0), normal(20, 2), gate_up, down)) > 1e-2  # the twin


@pytest.mark.parametrize("name", PATTERNS)
def test_models_are_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = noisy(spec_of(PATTERNS[name])), tokens_of(2, 41)  # more rows than the kernels of a step take
    with torch.no_grad(), monkeypatch.context() as patch:
        patch.setattr(onednn, "faster", lambda: False)
        want = model(tokens)
    with torch.inference_mode():
        assert gap(model(tokens), want) < 1e-5
        caches = model.new_caches(2, 41)
        done = prefill(model, tokens, caches, 16)
    assert gap(done.hidden, want[:, -1]) < 1e-5 and gap(done.hidden, want[:, -2]) > 1e-3


@pytest.mark.parametrize("name", PATTERNS)
def test_training_is_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss, every gradient, and the forward pass to the bit with and without one: the ratio of RL's first update."""
    model, tokens = noisy(spec_of(PATTERNS[name]), std=0.1), tokens_of(2, 41)

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        hidden = model(tokens)
        with torch.no_grad():
            assert torch.equal(model(tokens), hidden)
        loss = head_loss(hidden[:, :-1].flatten(0, 1), model.head_weight, tokens[:, 1:].flatten())[0]
        logp, entropy = token_logprobs(hidden[:, :-1].flatten(0, 1), model.head_weight, tokens[:, 1:].flatten())
        (loss + (logp.sin() + entropy).sum()).backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    ours = gradients()
    monkeypatch.setattr(onednn, "faster", lambda: False)
    theirs = gradients()
    scale = max(float(g.abs().max()) for g in theirs.values())
    assert ours.keys() == theirs.keys()
    assert max(float((ours[n] - theirs[n]).abs().max()) for n in ours) < 1e-5 * scale
    monkeypatch.setattr(onednn, "faster", lambda: True)
    monkeypatch.setattr(onednn, "times", lambda a, b: 1.001 * (a @ b.T))  # the twin: in the gradients of products
    twin = gradients()
    assert max(float((twin[n] - theirs[n]).abs().max()) for n in ours) > 1e-4 * scale


def test_what_may_not_be_had() -> None:
    """Weights that are frozen, a bias, rows with gaps in them."""
    x, w, bias = normal(7, 10, 24)[..., 4:], normal(12, 20), normal(12)
    for frozen in (0, 1, 2):
        parts = [t.clone().requires_grad_(i != frozen) for i, t in enumerate((x, w, bias))]
        got = onednn.linear(*parts)
        want = torch.nn.functional.linear(*parts)
        assert gap(got, want) < 1e-5
        for a, b in zip(
            *(torch.autograd.grad(y.sin().sum(), [t for t in parts if t.requires_grad]) for y in (got, want)),
            strict=True,
        ):
            assert gap(a, b) < 1e-5


def test_only_fp32_of_plain_tensors() -> None:
    x, w = normal(70, 96), normal(40, 96)
    assert onednn.applies(x, 1) and not onednn.applies(x.bfloat16(), 1)
    with torch.autocast("cpu", torch.bfloat16):
        assert not onednn.applies(x, 1)
    assert onednn.linear(x.bfloat16(), w.bfloat16()).dtype == torch.bfloat16
    a, b = x.view(2, 35, 96), w.view(2, 20, 96)
    ends = torch.tensor([35, 70])
    assert onednn.matmul(a, b.mT) is None and onednn.grouped(x, b, ends) is None  # only where there is no gradient
    with torch.inference_mode():
        assert onednn.matmul(a, b.mT) is not None and onednn.grouped(x, b, ends) is not None
