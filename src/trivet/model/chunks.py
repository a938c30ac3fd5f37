"""Dual chunk attention (arXiv 2402.17463): a model reads on past its length, with no distance that it has not met.

With n tokens a chunk and c = chunk_size, a key at j is rotated once, to p_k = j mod n, and stays in the
cache so. A query at i has three rotations, and which of them meets a key is a matter of their chunks:

    the same     intra   p_q = i mod n
    the one before  succ p_q = min(i mod n + n, c)      neighbours keep their true distance
    older        inter   p_q = c                        all far, at distances n to c
    y_i = softmax over all of them at once

The paper's far positions end at c - 1, the released code's (ChunkLlama, Qwen2.5-1M) at c; we follow the
code. Two forms: by ranges of keys, where a row's tokens stand in order (each score is computed once),
and by pairs, where rows differ (decoding, packed rows: three scores a pair, one is chosen).

Qwen2.5-1M's temperature takes each query's own position for the length (its other implementation, vLLM,
the whole prompt's), so that pieces, decoding and training agree. Left out: chunks in MLA and windows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from trivet.model.blocks import Reach, attend_blocks
from trivet.model.layers import Layout
from trivet.model.sparse import attend_prompt
from trivet.spec import DualChunks

Part = Literal["intra", "succ", "inter"]
PARTS: tuple[Part, ...] = ("intra", "succ", "inter")


@dataclass(frozen=True)
class Placed:
    """Where a token at a position stands: a `Place` of a Layout's rotations. Keys stand where "intra" says."""

    chunks: DualChunks
    part: Part

    def __call__(self, at: Tensor) -> Tensor:
        c, inside = self.chunks, at.clamp_min(0) % self.chunks.length
        if self.part == "intra":
            return inside
        if self.part == "succ":
            return (inside + c.length).clamp_max(c.chunk_size)
        return torch.full_like(inside, c.farthest)


def temperature(at: Tensor, original_length: int) -> Tensor:
    """m^2 [B,T] of queries at these positions."""
    m = 0.1 * ((at.clamp_min(0) + 1).float() / original_length).log() + 1
    return m.clamp_min(1).square()


def attend_chunks(q: Tensor, k: Tensor, v: Tensor, layout: Layout, chunks: DualChunks, scale: float) -> Tensor:
    """q [3,B,T,H,hd] rotated as PARTS, k [B,S,K,hd], v [B,S,K,vd] -> [B,T,H,vd]."""
    apart, reach = layout.apart(), Reach(chunks=chunks)
    if apart is not None:
        stacks = zip(zip(*(apart.split(form) for form in q), strict=True), apart.split(k), apart.split(v), strict=True)
        return apart.join([_by_ranges(torch.stack(one_q), one_k, one_v, scale, reach) for one_q, one_k, one_v in stacks], q.shape[1])  # fmt: skip
    if layout.prompt is not None:
        forms, prompt = q.transpose(2, 3), layout.prompt
        return attend_prompt(forms, k.transpose(1, 2), v.transpose(1, 2), scale, reach, prompt).transpose(1, 2)
    if layout.positions is None:
        return _by_ranges(q, k, v, scale, reach)
    return _by_pairs(q, k, v, layout, chunks, scale)


def _by_ranges(q: Tensor, k: Tensor, v: Tensor, scale: float, reach: Reach) -> Tensor:
    return attend_blocks(q.transpose(2, 3), k.transpose(1, 2), v.transpose(1, 2), scale, reach).transpose(1, 2)


def _by_pairs(q: Tensor, k: Tensor, v: Tensor, layout: Layout, chunks: DualChunks, scale: float) -> Tensor:
    length, heads = q.shape[2:4]
    group = heads // k.shape[2]
    queries = (q * scale).unflatten(3, (-1, group)).permute(1, 3, 0, 4, 2, 5)  # [B,K,3,H/K,T,hd]
    keys, values = k.permute(0, 2, 3, 1), v.transpose(1, 2)  # [B,K,hd,S], [B,K,S,vd]
    intra, succ, inter = (queries.flatten(2, 4) @ keys).unflatten(2, (3, group, length)).unbind(2)  # [B,K,H/K,T,S]
    at = layout.at().clamp_min(0)
    where = torch.arange(k.shape[1], device=k.device)[None] if layout.cached else at
    apart = (at // chunks.length).unsqueeze(-1) - (where // chunks.length).unsqueeze(-2)  # [B,T,S] chunks between
    apart, seen = apart[:, None, None], layout.mask()
    assert seen is not None
    scores = torch.where(apart == 0, intra, torch.where(apart == 1, succ, inter))
    weights = scores.masked_fill(~seen.unsqueeze(1), float("-inf")).softmax(-1)
    y = weights.flatten(2, 3) @ values  # [B,K,H/K*T,vd]
    return y.unflatten(2, (group, length)).flatten(1, 2).transpose(1, 2)
