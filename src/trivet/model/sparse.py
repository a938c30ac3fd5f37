"""Sparse prefill: of a long prompt's attention, only the lines that matter (MInference, arXiv 2407.02490).

In long prompts a head's attention lies on a few columns (tokens that everyone looks at) and a few
diagonals (distances at which everyone looks). Both are seen in the last queries of a piece:

    A = softmax(q_last k^T scale)          [64, S], causal
    vertical   the columns with the largest sum of A, the first `sinks` always
    slash      the diagonals with the largest sum of A, the nearest `local` always

A block of queries then attends to the keys of its columns and to the blocks of keys that its diagonals
cross: somewhat more than the lines, in dense products. The other pairs are not computed, which changes
the result; `Kept` counts them, and can measure the attention mass that was recovered,
exp(LSE of what was kept - LSE of everything), on one query a block.

Lines are found for each head, row and piece anew. With dual chunks the scores are those of attention
itself (Qwen2.5-1M's code estimates with unclamped positions). Left out: counts of lines tuned a head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trivet.model.blocks import Reach, attend_blocks
from trivet.model.prompt import Prompt, Sparse

BLOCK = 64  # queries that share their keys: fewer waste less on diagonals, more make larger products
KEYS = 16  # keys of a block that a diagonal is widened to


def attend_prompt(q: Tensor, k: Tensor, v: Tensor, scale: float, reach: Reach, prompt: Prompt) -> Tensor:
    """A piece of a prompt: q [R,B,H,T,hd] in R forms, k [B,K,S,hd], v [B,K,S,vd] -> [B,H,T,vd].

    Exact without `Sparse`, in a window layer, and where the lines would be all there is.
    """
    sparse, span = prompt.sparse, k.shape[2]
    length = q.shape[3]
    if sparse is None or reach.window is not None or max(sparse.vertical, sparse.slash) >= span:
        heads = q.shape[2]
        pairs = heads * sum(_causal(prompt.start, prompt.start + n, reach) for n in prompt.real)
        prompt.kept.add(pairs, pairs)
        return attend_blocks(q, k, v, scale, reach)
    out = q.new_zeros(*q.shape[1:4], v.shape[-1])
    group = q.shape[2] // k.shape[1]
    for row, real in enumerate(prompt.real):
        if real == 0:
            continue
        stop = span - length + real
        chosen = find_lines(q[:, row, :, max(0, real - sparse.last) : real], k[row, :, :stop], scale, reach, sparse)
        for head in range(q.shape[2]):
            queries, keys, values = q[:, row, head, :real], k[row, head // group, :stop], v[row, head // group, :stop]
            out[row, head, :real] = attend_lines(queries, keys, values, scale, reach, chosen[head], prompt)
    return out


Lines = tuple[Tensor, Tensor]  # columns, and distances of diagonals, both sorted


def find_lines(q: Tensor, k: Tensor, scale: float, reach: Reach, sparse: Sparse) -> list[Lines]:
    """The lines of each head, from its last queries: q [R,H,n,hd] against k [K,S,hd], whose last n keys are theirs."""
    heads, count, span = q.shape[1], q.shape[2], k.shape[1]
    group = heads // len(k)
    vertical, slash = (q.new_zeros(heads, span, dtype=torch.float32) for _ in range(2))
    for start, end in reach.blocks(span - count, span, count):
        rows = slice(start - span + count, end - span + count)
        queries = q[:, :, rows].unflatten(1, (-1, group)) * scale  # [R,K,H/K,t,hd]
        parts = [queries[form] @ k[:, None, lo:hi].mT for form, lo, hi in reach.ranges(start, end)]
        scores = torch.cat(parts, -1).flatten(0, 1).float()  # [H,t,end]
        future = torch.arange(end, device=k.device) > torch.arange(start, end, device=k.device)[:, None]
        seen = scores.masked_fill_(future, float("-inf")).softmax(-1)
        vertical[:, :end] += seen.sum(1)
        for i, at in enumerate(range(start, end)):
            slash[:, : at + 1] += seen[:, i, : at + 1].flip(-1)
    vertical[:, : sparse.sinks] = float("inf")
    slash[:, : sparse.local] = float("inf")
    columns = vertical.topk(min(sparse.vertical, span), sorted=False).indices.sort(-1).values
    distances = slash.topk(min(sparse.slash, span), sorted=False).indices.sort(-1).values
    return list(zip(columns, distances, strict=True))


def attend_lines(q: Tensor, k: Tensor, v: Tensor, scale: float, reach: Reach, lines: Lines, prompt: Prompt) -> Tensor:
    """One head, its lines only: q [R,T,hd], k [S,hd], v [S,vd] -> [T,vd]; the queries are the last T positions."""
    length, span = q.shape[1], len(k)
    sparse, done = prompt.sparse, []
    assert sparse is not None
    for start, end in reach.blocks(span - length, span, BLOCK):
        keys = chosen_keys(lines, start, end)  # [s]
        values, near = v[keys], k[keys]
        queries = q[:, start - span + length : end - span + length] * scale
        ranges = reach.ranges(start, end)
        borders = torch.searchsorted(keys, torch.tensor([hi for _, _, hi in ranges], device=k.device)).tolist()
        parts, lo = [], 0
        for (form, _, _), hi in zip(ranges, borders, strict=True):
            parts.append(queries[form] @ near[lo:hi].T)
            lo = hi
        scores = torch.cat(parts, -1)  # [t,s]
        future = keys > torch.arange(start, end, device=k.device)[:, None]
        scores = scores.masked_fill(future, float("-inf"))
        done.append(scores.softmax(-1) @ values)
        mass = None
        if sparse.measure:
            middle = (end - start) // 2
            all_scores = [queries[form, middle] @ k[lo : min(hi, start + middle + 1)].T for form, lo, hi in ranges]
            mass = float((scores[middle].float().logsumexp(0) - torch.cat(all_scores).float().logsumexp(0)).exp())
        prompt.kept.add(future.numel() - int(future.sum()), _causal(start, end, reach), mass)
    return torch.cat(done)


def chosen_keys(lines: Lines, start: int, end: int) -> Tensor:
    """Sorted keys below `end` that the queries start..end-1 attend to: columns, and blocks that diagonals cross."""
    columns, distances = lines
    newest = (end - 1 - distances).clamp_min(-1)  # of the last query; the first one's is end - start - 1 earlier
    newest = newest[newest >= 0]
    oldest = (newest - (end - 1 - start)).clamp_min(0)
    blocks = torch.zeros(-(-end // KEYS), dtype=torch.bool, device=columns.device)
    first, last = oldest // KEYS, newest // KEYS
    for step in range((end - 1 - start) // KEYS + 2):
        blocks[torch.minimum(first + step, last)] = True
    wanted = blocks.repeat_interleave(KEYS)[:end]
    wanted[columns[columns < end]] = True
    wanted[start:end] = True  # a query sees itself at least, whatever the lines are
    return wanted.nonzero().squeeze(1)


def _causal(start: int, stop: int, reach: Reach) -> int:
    """Pairs of the queries start..stop-1 with the keys that they may see."""
    if reach.window is None:
        return (start + 1 + stop) * (stop - start) // 2
    return sum(min(at + 1, reach.window) for at in range(start, stop))
