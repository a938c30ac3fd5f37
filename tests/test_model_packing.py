"""Packed documents equal separate ones: loss and every gradient, for every mixer and residual style."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from test_model_zoo import PATTERNS, gap, next_token_loss, noisy, spec_of, tokens_of
from trivet.model import Transformer, delta, ffn, layers, linear
from trivet.model.packed import Apart

ROWS = [[5, 9, 1, 7], [4, 4, 11]]  # document lengths; the second row ends in padding


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for room in (linear, delta):
        monkeypatch.setattr(room, "CHUNK", 4)
    monkeypatch.setattr(ffn, "NEEDLESS", {})  # the form that training takes
    yield


def packed() -> tuple[Tensor, Tensor, list[Tensor]]:
    width = max(map(sum, ROWS)) + 3
    tokens, positions = tokens_of(len(ROWS), width), torch.full((len(ROWS), width), -1)
    documents = []
    for b, lengths in enumerate(ROWS):
        at = 0
        for n in lengths:
            positions[b, at : at + n] = torch.arange(n)
            documents.append(tokens[b, at : at + n])
            at += n
    return tokens, positions, documents


def gradients(model: Transformer, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", PATTERNS)
def test_packed_equals_unpacked(name: str) -> None:
    model = noisy(spec_of(PATTERNS[name]), std=0.1)
    tokens, positions, documents = packed()
    together = next_token_loss(model, tokens, positions)
    apart = torch.stack([next_token_loss(model, d[None]) for d in documents]).sum()
    assert gap(together, apart) < 1e-5
    a, b = gradients(model, together), gradients(model, apart)
    assert a.keys() == b.keys() == {n for n, _ in model.named_parameters()}
    scale = max(float(g.abs().max()) for g in b.values())
    for key in a:
        assert float((a[key] - b[key]).abs().max()) < 1e-5 * scale, key


@pytest.mark.parametrize("name", PATTERNS)
def test_documents_that_run_together_give_another_loss(name: str) -> None:
    """The twin: without the restart at 0 a document sees its neighbour."""
    model = noisy(spec_of(PATTERNS[name]))
    tokens, positions, _ = packed()
    logits = model.logits(model(tokens, positions))
    leaky = model.logits(model(tokens))
    assert gap(leaky[0, :5], logits[0, :5]) < 1e-5  # the first document is the same ...
    assert gap(leaky[0, 5:14], logits[0, 5:14]) > 1e-2  # ... the second is not


@pytest.mark.parametrize("name", PATTERNS)
def test_a_token_changes_nothing_before_it_nor_in_other_documents(name: str) -> None:
    model = noisy(spec_of(PATTERNS[name]))
    tokens, positions, _ = packed()
    changed = tokens.clone()
    changed[0, 8] = (changed[0, 8] + 1) % 37  # inside the second document (5..13) of row 0
    moved = (model(tokens, positions) - model(changed, positions)).abs().amax(-1) > 1e-5
    assert not moved[0, :8].any() and not moved[0, 14:].any() and not moved[1].any()
    window = 4 if name == "window" else 5
    assert moved[0, 8 : 8 + window].all()


@pytest.mark.parametrize("name", ["gqa", "window", "mla"])
def test_masked_rows_and_single_documents_agree(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = noisy(spec_of(PATTERNS[name]), std=0.1)
    tokens, positions, _ = packed()
    taken: list[bool] = []
    real = Apart.split
    monkeypatch.setattr(Apart, "split", lambda self, x: (taken.append(True), real(self, x))[1])

    def form(worth_it: float) -> dict[str, Tensor]:
        monkeypatch.setattr(layers, "WORTH_IT", worth_it)
        taken.clear()
        loss = next_token_loss(model, tokens, positions)
        assert bool(taken) == (worth_it > 0)
        return gradients(model, loss) | {"loss": loss.detach()}

    masked, apart = form(0.0), form(1.0)
    scale = max(float(g.abs().max()) for n, g in masked.items() if n != "loss")
    assert gap(apart["loss"], masked["loss"]) < 1e-5
    assert all(float((apart[n] - masked[n]).abs().max()) < 1e-5 * scale for n in masked if n != "loss")
    # the twin: two slots of one document that change places show
    whole = Apart.of

    def mixed_up(at: Tensor) -> Apart:
        found = whole(at)
        found.order[[0, 1]] = found.order[[1, 0]]
        return found

    monkeypatch.setattr(Apart, "of", mixed_up)
    assert gap(form(1.0)["loss"], masked["loss"]) > 1e-4


def test_taking_apart_and_joining_is_the_identity() -> None:
    """Documents of any lengths, a row that begins in the middle of one, padding at either end."""
    positions = torch.tensor([[3, 4, 0, 1, 2, 0, -1, -1], [-1, 0, 1, 2, 3, 4, 5, 6], [0, 0, 0, 1, 0, -1, -1, -1]])
    apart = Apart.of(positions)
    x = torch.randn(3, 8, 2, 5, requires_grad=True)
    stacks = apart.split(x)
    assert sum(n for n, _ in apart.shapes) == 8 and apart.pairs < 3 * 64
    back = apart.join(stacks, 3)
    real = (positions >= 0)[..., None, None]
    assert torch.equal(back, torch.where(real, x, 0.0))
    (back * torch.arange(240.0).view(3, 8, 2, 5)).sum().backward()
    assert x.grad is not None and torch.equal(x.grad, torch.where(real, torch.arange(240.0).view(3, 8, 2, 5), 0.0))
    for stack, (n, length) in zip(stacks, apart.shapes, strict=True):  # whole documents, in order
        assert stack.shape == (n, length, 2, 5)
    rows = {tuple(d[d.abs().sum(-1) > 0].flatten().tolist()) for stack in stacks for d in stack[:, :, 0].detach()}
    assert tuple(x[1, 1:, 0].flatten().tolist()) in rows and tuple(x[0, :2, 0].flatten().tolist()) in rows
