"""Attention in plain products, a block of queries at a time: for what fused kernels do not offer.

    y_i = sum over j <= i of softmax_j(q_i . k_j scale) v_j

The queries are the last T of S positions, as when a piece of a long prompt meets its cache. A block of
them reads the keys up to its last query and no others, so there is no [T,S] mask, and working memory
does not grow with S: longer rows are cut into smaller blocks. What a mixer may add is a `Reach`: how
far back a query sees, and that it is rotated differently for different keys (`chunks.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from trivet.spec import DualChunks

BLOCK, LEAST = 128, 16  # queries of a block, at most and at least
SCORES = 2**21  # scores that a block may take, if it can be made smaller
PIECE = 2**20  # scores worked on at a time: what a core's cache holds

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
        """What the queries start..end-1 see, oldest key first; without chunks there is one form, 0."""
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
    keys, values = k.flatten(0, 1).transpose(-1, -2), v.flatten(0, 1)
    size = max(LEAST, min(BLOCK, SCORES // (group * span)))
    done = []
    for start, end in reach.blocks(span - length, span, size):
        rows = slice(start - span + length, end - span + length)
        ranges, hidden = reach.ranges(start, end), _hidden(start, end, reach, q.device)
        step = max(1, PIECE // (group * (end - start) * end))
        parts = []
        for some in (slice(i, i + step) for i in range(0, pairs, step)):
            scores = torch.cat([queries[form, some, :, rows].flatten(1, 2) @ keys[some, :, lo:hi] for form, lo, hi in ranges], -1)  # fmt: skip
            scores = scores.unflatten(1, (group, -1)).masked_fill(hidden, float("-inf"))  # [pairs,H/K,t,s]
            weights = scores.softmax(-1).flatten(1, 2)
            parts.append((weights @ values[some, ranges[0][1] : end]).unflatten(1, (group, -1)))
        done.append(torch.cat(parts))
    return torch.cat(done, 2).view(batch, heads, length, -1)


def _hidden(start: int, end: int, reach: Reach, device: torch.device) -> Tensor:
    """bool [t,s]: which of the keys of `reach.ranges` each query of the block must not see."""
    first = reach.ranges(start, end)[0][1]
    query, key = torch.arange(start, end, device=device)[:, None], torch.arange(first, end, device=device)
    hidden = key > query
    return hidden if reach.window is None else hidden | (key <= query - reach.window)
