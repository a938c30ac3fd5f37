"""Attention in plain products, a block of queries against a block of keys: for what fused kernels do not offer.

    m' = max(m, max s),   l' = l e^(m - m') + sum e^(s - m'),   a' = a e^(m - m') + e^(s - m') v,   y = a / l

with the scores s = q . k scale of one block of keys after the other (online softmax, arXiv 1805.02867, as
FlashAttention); one softmax where the keys of a block are few enough. The queries are the last T of S positions, as
when a piece of a long prompt meets its cache: there is no [T,S] mask, keys that no query of a block sees are not
read, and working memory does not grow with S. What a mixer may add is a `Reach`: how far back a query sees, and that
it is rotated differently for different keys (`chunks.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from trivet.model import onednn
from trivet.spec import DualChunks

BLOCK = 128  # queries of a block
SCORES = 2**19  # scores worked on at a time: what a core's cache holds
WHOLE = 2**23  # scores up to which one softmax over all keys of a block is faster than several in turn (docs/LOG.md)

Range = tuple[int, int, int]  # (which of a query's forms, from this key, to before this one)


@dataclass(frozen=True)
class Reach:
    """Which keys a query sees, and in which of its forms. window counts the query itself."""

    window: int | None = None
    chunks: DualChunks | None = None

    def blocks(self, start: int, stop: int, size: int) -> Iterator[tuple[int, int]]:
        """Positions start..stop-1 in blocks of at most `size`, none of which crosses a chunk's border."""
        while start < stop:
            end = min(start + size, stop)
            if self.chunks is not None:
                end = min(end, (start // self.chunks.length + 1) * self.chunks.length)
            yield start, end
            start = end

    def ranges(self, start: int, end: int) -> list[Range]:
        """What the queries start..end-1 of a block see, oldest key first; without chunks there is one form, 0."""
        if self.chunks is None:
            return [(0, 0 if self.window is None else max(0, start - self.window + 1), end)]
        mine = start // self.chunks.length * self.chunks.length
        before = max(0, mine - self.chunks.length)
        return [r for r in ((2, 0, before), (1, before, mine), (0, mine, end)) if r[1] < r[2]]


def attend_blocks(q: Tensor, k: Tensor, v: Tensor, scale: float, reach: Reach) -> Tensor:
    """q [R,B,H,T,hd] in R forms, k [B,K,S,hd], v [B,K,S,vd] -> [B,H,T,vd]; T <= S."""
    batch, heads, length = q.shape[1:4]
    kv_heads, span = k.shape[1:3]
    group, pairs = heads // kv_heads, batch * kv_heads
    queries = (q * scale).reshape(len(q), pairs, group, length, -1)
    keys, values = k.flatten(0, 1), v.flatten(0, 1)
    if onednn.applies_in_inference(q, onednn.LEAST):  # once, not for every block: MLA's heads lie side by side
        keys, values = (x if x.stride(1) == x.shape[2] else x.contiguous() for x in (keys, values))
    done = []
    for start, end in reach.blocks(span - length, span, BLOCK):
        rows = slice(start - span + length, end - span + length)
        size, ranges = group * (end - start), reach.ranges(start, end)
        whole = len(ranges) == 1 and size * (ranges[0][2] - ranges[0][1]) <= WHOLE
        most = max(1, (WHOLE if whole else SCORES) // size)  # keys at a time
        pieces = [(form, at, min(at + most, hi)) for form, lo, hi in ranges for at in range(lo, hi, most)]
        some = max(1, SCORES // (size * end))  # pairs at a time
        parts = [
            _block(queries[:, i : i + some, :, rows], keys[i : i + some], values[i : i + some], start, pieces, reach)
            for i in range(0, pairs, some)
        ]
        done.append(torch.cat(parts))
    return torch.cat(done, 2).view(batch, heads, length, -1)


def _block(q: Tensor, k: Tensor, v: Tensor, start: int, pieces: list[Range], reach: Reach) -> Tensor:
    """q [R,P,G,t,hd], the queries at `start` and on, k [P,S,hd], v [P,S,vd] -> [P,G,t,vd]."""
    group, count = q.shape[2:4]
    if len(pieces) == 1:
        weights = _scores(q, k, start, pieces[0], reach).softmax(-1)  # summed in fp32, whatever its type
        return product(weights, v[:, slice(*pieces[0][1:])]).unflatten(1, (group, count))
    # Sums over a long row are kept in fp32, whatever the type of what is summed.
    top = torch.full((len(k), group * count, 1), torch.finfo(torch.float32).min, device=q.device)
    total, mixed = torch.zeros_like(top), top.new_zeros(len(k), group * count, v.shape[-1])
    for piece in pieces:
        scores = _scores(q, k, start, piece, reach).float()
        higher = torch.maximum(top, scores.detach().amax(-1, keepdim=True))  # cancels: no gradient
        weights, kept = (scores - higher).exp(), (top - higher).exp()
        total = total * kept + weights.sum(-1, keepdim=True)
        mixed = mixed * kept + product(weights.to(v.dtype), v[:, slice(*piece[1:])])
        top = higher
    return (mixed / total).to(v.dtype).unflatten(1, (group, count))


def _scores(q: Tensor, k: Tensor, start: int, piece: Range, reach: Reach) -> Tensor:
    """[P,G*t,s] of one form of the queries with the keys of a piece, -inf where a key is not seen."""
    form, lo, hi = piece
    group, count = q.shape[2:4]
    scores = product(q[form].flatten(1, 2), k[:, lo:hi].mT)
    window = start + count if reach.window is None else reach.window
    first = lo if lo < start + count - window else max(lo, start)  # all queries see the keys before it
    if first < hi:
        query, key = torch.arange(start, start + count, device=q.device), torch.arange(first, hi, device=q.device)
        hidden = (key > query[:, None]) | (key <= query[:, None] - window)
        scores.unflatten(1, (group, count))[..., first - lo :].masked_fill_(hidden, float("-inf"))
    return scores


def product(a: Tensor, b: Tensor) -> Tensor:
    """a [P,n,k] @ b [P,k,m]"""
    y = onednn.matmul(a, b)
    return a @ b if y is None else y
