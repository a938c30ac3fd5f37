"""Cached decoding equals the full forward pass, for every mixer and every way an engine uses a row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

from test_model_zoo import PATTERNS, gap, noisy, spec_of, tokens_of
from trivet.model import LayerCache, Transformer, delta, ffn, linear

T = 23
TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for room in (linear, delta):
        monkeypatch.setattr(room, "CHUNK", 4)  # so that short prompts cross chunk boundaries
    monkeypatch.setattr(ffn, "NEEDLESS", {("cpu", 4): 384})  # steps fused, the full pass sorted
    torch.set_grad_enabled(False)
    yield
    torch.set_grad_enabled(True)


def run(
    model: Transformer, caches: Sequence[LayerCache], tokens: Tensor, chunks: Sequence[int], start: int = 0,
    span: bool = True,
) -> Tensor:  # fmt: skip
    """Feed tokens [B,T] in pieces of these sizes, all rows at the same position."""
    out, at = [], 0
    for size in chunks:
        positions = torch.arange(start + at, start + at + size).expand(len(tokens), -1)
        piece = tokens[:, at : at + size]
        out.append(model(piece, positions, caches, span=start + at + size if span else None))
        at += size
    assert at == tokens.shape[1]
    return torch.cat(out, 1)


def place(rows: Sequence[tuple[Tensor, int]], width: int, right: bool) -> tuple[Tensor, Tensor]:
    """(tokens of a row, its first position) -> padded tokens and positions [B,width]."""
    tokens = torch.full((len(rows), width), 11)
    positions = torch.full((len(rows), width), -1)
    for b, (ids, start) in enumerate(rows):
        where = slice(0, len(ids)) if right else slice(width - len(ids), width)
        tokens[b, where] = ids
        positions[b, where] = torch.arange(start, start + len(ids))
    return tokens, positions


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("chunks", [[1] * T, [7, 3, 1, 1, 5, 1, 4, 1], [T]], ids=["decode", "odd", "prefill"])
def test_pieces_equal_the_whole(name: str, chunks: list[int]) -> None:
    model, tokens = noisy(spec_of(PATTERNS[name])), tokens_of(2, T)
    want = model(tokens)
    caches = model.new_caches(3, T + 6)
    assert gap(run(model, caches, tokens, chunks), want) < TOLERANCE
    assert gap(run(model, model.new_caches(2, T), tokens, chunks, span=False), want) < TOLERANCE


@pytest.mark.parametrize("name", PATTERNS)
def test_a_changed_memory_shows(name: str) -> None:
    """The twin: what the cache holds matters, to every layer."""
    model, tokens = noisy(spec_of(PATTERNS[name])), tokens_of(2, T)
    want = model(tokens)[:, 20:]
    for layer in range(len(model.layers)):
        caches = model.new_caches(2, T)
        run(model, caches, tokens[:, :20], [20])
        caches[layer].tensors[0][:] *= 1.05
        assert gap(run(model, caches, tokens[:, 20:], [1, 2], start=20), want) > 10 * TOLERANCE


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("right", [True, False], ids=["padded right", "padded left"])
def test_rows_at_different_positions(name: str, right: bool) -> None:
    """Prompts of 9, 4 and 6 in one padded call, a second padded piece, then one token a row."""
    model, tokens = noisy(spec_of(PATTERNS[name])), tokens_of(3, T)
    want, caches = model(tokens), model.new_caches(3, T)
    at = [0, 0, 0]
    for sizes in ([9, 4, 6], [2, 5, 1], [1, 1, 1], [1, 1, 1]):
        rows = [(tokens[b, at[b] : at[b] + n], at[b]) for b, n in enumerate(sizes)]
        ids, positions = place(rows, max(sizes), right)
        got = model(ids, positions, caches)
        for b, n in enumerate(sizes):
            assert gap(got[b][positions[b] >= 0], want[b, at[b] : at[b] + n]) < TOLERANCE
            at[b] += n


@pytest.mark.parametrize("name", PATTERNS)
def test_a_row_starts_again_at_position_0(name: str) -> None:
    """Row 1 is given to a new sequence while row 0 goes on; by prefill and token by token."""
    model, old, new = noisy(spec_of(PATTERNS[name])), tokens_of(2, T), tokens_of(1, T, seed=1)[0]
    want_old, want_new = model(old), model(new[None])[0]
    caches = model.new_caches(2, T)
    run(model, caches, old[:, :10], [10])
    ids, positions = place([(old[0, 10:12], 10), (new[:5], 0)], 5, right=True)
    got = model(ids, positions, caches)
    assert gap(got[0, :2], want_old[0, 10:12]) < TOLERANCE and gap(got[1], want_new[:5]) < TOLERANCE
    for i in range(4):  # ... and once more, one token at a time
        ids, positions = place([(old[0, 12 + i : 13 + i], 12 + i), (new[i : i + 1], i)], 1, right=True)
        got = model(ids, positions, caches)
        assert gap(got[0], want_old[0, 12 + i : 13 + i]) < TOLERANCE
        assert gap(got[1], want_new[i : i + 1]) < TOLERANCE


@pytest.mark.parametrize("name", PATTERNS)
def test_an_idle_row_is_left_untouched(name: str) -> None:
    model, tokens = noisy(spec_of(PATTERNS[name])), tokens_of(2, T)
    caches = model.new_caches(2, T)
    run(model, caches, tokens[:, :8], [8])
    slots = [t for c in caches for t in c.tensors]
    before = [t[1].clone() for t in slots]
    for width in (3, 1, 1):
        at = 8 if width == 3 else 11
        ids, positions = place([(tokens[0, at : at + width], at), (tokens[0, :0], 0)], width, right=True)
        model(ids, positions, caches)
    for old, t in zip(before, slots, strict=True):
        # The spare slot of a KV or latent cache takes what has no place; it is never read.
        kept = [o.narrow(-2, 0, min(T, o.shape[-2])) for o in (old, t[1])]
        assert torch.equal(*kept)
    got = run(model, [_row(c, 1) for c in caches], tokens[1:, 8:], [T - 8], start=8)
    assert gap(got, model(tokens)[1:, 8:]) < TOLERANCE
    assert not all(torch.equal(t[0], o) for t, o in zip(slots, before, strict=True))  # row 0 did move


def _row(cache: LayerCache, row: int) -> LayerCache:
    cache.keep_rows(torch.tensor([row]))
    return cache


@pytest.mark.parametrize("name", PATTERNS)
def test_forked_and_kept_rows_go_on_alone(name: str) -> None:
    """Two prompts forked to five rows of another cache, then compacted to three in a new order."""
    model, prompts = noisy(spec_of(PATTERNS[name])), tokens_of(2, 6)
    tails = tokens_of(5, 9, seed=2)
    src, dst = torch.tensor([0, 1, 0, 1, 0]), torch.tensor([4, 0, 2, 3, 1])
    whole = torch.empty(5, 15, dtype=torch.long)
    whole[dst] = torch.cat((prompts[src], tails[dst]), 1)
    want = model(whole)
    first, caches = model.new_caches(2, 20), model.new_caches(5, 20)
    run(model, first, prompts, [5, 1])
    for mine, theirs in zip(caches, first, strict=True):
        mine.copy_rows(src, dst, source=theirs)
    assert gap(run(model, caches, whole[:, 6:9], [1, 2], start=6), want[:, 6:9]) < TOLERANCE
    keep = torch.tensor([3, 0, 4])
    size = sum(c.nbytes for c in caches)
    for cache in caches:
        cache.keep_rows(keep)
    assert sum(c.nbytes for c in caches) * 5 == size * 3
    got = run(model, caches, whole[keep][:, 9:], [1, 3, 2], start=9)
    assert gap(got, want[keep][:, 9:]) < TOLERANCE
    assert gap(got, want[keep.roll(1)][:, 9:]) > 0.01  # rows do differ
    # within one cache: row 2 becomes row 0 and sees row 0's history
    for cache in caches:
        cache.copy_rows(torch.tensor([0]), torch.tensor([2]))
    again = tokens_of(3, 2, seed=3)
    again[2] = again[0]
    got = run(model, caches, again, [1, 1], start=15)
    assert gap(got[2], got[0]) < TOLERANCE and gap(got[1], got[0]) > 0.01
