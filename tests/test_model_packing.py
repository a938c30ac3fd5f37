"""Packed documents equal separate ones: loss and every gradient, for every mixer and residual style."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from test_model_zoo import PATTERNS, gap, next_token_loss, noisy, spec_of, tokens_of
from trivet.model import Transformer, ffn, linear

ROWS = [[5, 9, 1, 7], [4, 4, 11]]  # document lengths; the second row ends in padding


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(linear, "CHUNK", 4)
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
    model = noisy(spec_of(PATTERNS[name]))
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
    moved = (model(tokens, positions) - model(changed, positions)).abs().amax(-1) > 1e-6
    assert not moved[0, :8].any() and not moved[0, 14:].any() and not moved[1].any()
    window = 4 if name == "window" else 5
    assert moved[0, 8 : 8 + window].all()
