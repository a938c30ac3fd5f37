"""Answers that share their prompt in a row equal answers with a prompt each: every mixer, values and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from test_model_packing import small_chunks as small_chunks  # chunks shorter than the documents
from test_model_zoo import PATTERNS, gap, noisy, spec_of, tokens_of
from trivet.model import Transformer, layers
from trivet.model.packed import Apart

# A row is documents, a document its first piece and branches: (shared, own). Padding between pieces and behind them.
ROWS = [[[(0, 9), (6, 3), (6, 7), (2, 5)], [(0, 4)], [(0, 5), (4, 6)]], [[(0, 13), (13, 4), (1, 2)], [(0, 7), (3, 3)]]]


def laid_out() -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
    """tokens and positions [B,T], and of each strand its tokens and where in the flat batch its own ones lie."""
    width = 2 + max(sum(own + 1 for doc in row for _, own in doc) for row in ROWS)
    tokens, positions = tokens_of(len(ROWS), width), torch.full((len(ROWS), width), -1)
    strands = []
    for b, row in enumerate(ROWS):
        at = 0
        for doc in row:
            first = at
            for i, (shared, own) in enumerate(doc):
                positions[b, at : at + own] = torch.arange(shared, shared + own)
                whole = torch.cat((tokens[b, first : first + shared], tokens[b, at : at + own]))
                strands.append((whole, b * width + torch.arange(at, at + own)))
                at += own + i % 2  # a hole after every second piece
    return tokens, positions, strands


def outcome(model: Transformer, hidden: Tensor, places: Tensor) -> dict[str, Tensor]:
    """A loss that tells every number of every token from the others, and its gradients."""
    model.zero_grad()
    scale = torch.sin(torch.outer(places + 1.0, torch.arange(1.0, 1 + hidden.shape[-1])))
    (hidden * scale).sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def shared(model: Transformer, positions: Tensor, apart: Apart | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    tokens, _, strands = laid_out()
    places = torch.cat([where for _, where in strands])
    hidden = model(tokens, positions, apart=apart).flatten(0, 1)[places]
    return hidden.detach(), outcome(model, hidden, places)


def separate(model: Transformer) -> tuple[Tensor, dict[str, Tensor]]:
    strands = laid_out()[2]
    hidden = torch.cat([model(whole[None])[0, -len(where) :] for whole, where in strands])
    return hidden.detach(), outcome(model, hidden, torch.cat([where for _, where in strands]))


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("name", PATTERNS)
def test_shared_prompts_equal_prompts_of_their_own(name: str, masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "WORTH_IT", 0.0 if masked else 100.0)
    model = noisy(spec_of(PATTERNS[name]), std=0.1)
    positions = laid_out()[1]
    (ours, a), (theirs, b) = shared(model, positions), separate(model)
    assert gap(ours, theirs) < 1e-5
    scale = max(float(g.abs().max()) for g in b.values())
    assert a.keys() == b.keys()
    for key in a:
        assert float((a[key] - b[key]).abs().max()) < 1e-5 * scale, key
    given, c = shared(model, positions, Apart.of(positions))  # as a caller passes it
    assert torch.equal(given, ours) and all(torch.equal(a[key], c[key]) for key in a)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("name", PATTERNS)
def test_a_branch_that_goes_on_elsewhere_shows(name: str, masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin: a branch moved by one token, and one that is a document of its own."""
    monkeypatch.setattr(layers, "WORTH_IT", 0.0 if masked else 100.0)
    model = noisy(spec_of(PATTERNS[name]))
    tokens, positions, _ = laid_out()
    true = model(tokens, positions)
    last = slice(int((positions[0] == 9).nonzero()[-1]) - 5, None)  # the last branch of row 0: positions 4 to 9
    assert positions[0, last][:6].tolist() == [4, 5, 6, 7, 8, 9]
    for start in (3, 0):
        moved = positions.clone()
        moved[0, last][:6] = torch.arange(start, start + 6)
        away = (model(tokens, moved) - true).abs().amax(-1) > 1e-4
        assert away[0, last].any() and not away[0, : last.start].any() and not away[1].any()


@pytest.mark.parametrize("name", PATTERNS)
def test_a_branch_sees_no_other_branch(name: str) -> None:
    model = noisy(spec_of(PATTERNS[name]))
    tokens, positions, _ = laid_out()
    changed = tokens.clone()
    changed[0, 10] = (changed[0, 10] + 1) % 37  # inside the first branch of row 0
    away = (model(tokens, positions) - model(changed, positions)).abs().amax(-1) > 1e-5
    assert away[0, 10] and away[0].sum() <= 2 and not away[1].any()


def test_a_shared_token_collects_the_gradients_of_all_its_strands() -> None:
    positions = torch.tensor([[0, 1, 2, 2, 3, -1, 1, 0]])
    apart = Apart.of(positions)
    assert apart.branches and sum(n for n, _ in apart.shapes) == 4
    x = torch.arange(1.0, 9).view(1, 8, 1).requires_grad_()
    stacks = apart.split(x)
    rows = {tuple(v for v in strand.flatten().tolist() if v) for stack in stacks for strand in stack}
    assert rows == {(1, 2, 3), (1, 2, 4, 5), (1, 7), (8,)}
    sum(stack.sum() for stack in stacks).backward()  # type: ignore[union-attr]
    assert x.grad is not None and x.grad.flatten().tolist() == [3, 2, 1, 1, 1, 0, 1, 1]
    assert torch.equal(apart.join(stacks, 1), torch.where(positions[..., None] >= 0, x, 0))


def test_a_branch_off_more_than_there_is_is_refused() -> None:
    with pytest.raises(ValueError, match="fall to 3 in a document whose first piece has 2 tokens"):
        Apart.of(torch.tensor([[0, 1, 0, 1, -1, 3]]))
