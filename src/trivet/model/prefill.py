"""A long prompt through the model in pieces: the caches carry what is past, so working memory stays that of a piece.

Every mixer reads a piece as a continuation: attention against its cache in blocks of queries (`blocks.py`),
MLA head by head, lightning from its state. The result is that of one whole call. With `Sparse`, attention
computes chosen lines only (`sparse.py`), and says what it left out.

Rows are aligned: all start at the same position; shorter ones end earlier and wait.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trivet.config import UserError
from trivet.model.cache import LayerCache
from trivet.model.ffn import Routing
from trivet.model.prompt import Kept, Prompt, Sparse
from trivet.model.transformer import Transformer

CHUNK = 512  # tokens of a piece


@dataclass
class Prefilled:
    """hidden [B,D]: each row's last token, after the final norm. experts: one [B,T,k] a MoE layer, if recorded.
    kept: what sparse attention computed; with exact attention, everything."""

    hidden: Tensor
    experts: list[Tensor] | None
    kept: Kept


@torch.no_grad()
def prefill(
    model: Transformer,
    tokens: Tensor,
    caches: Sequence[LayerCache],
    chunk: int = CHUNK,
    lengths: Sequence[int] | None = None,
    start: int = 0,
    sparse: Sparse | None = None,
    record_experts: bool = False,
) -> Prefilled:
    """Write tokens [B,T] at positions start.. into rows 0..B-1 of `caches`, in equal pieces of at most `chunk`.

    lengths: tokens of each row, the rest of it is padding; None: all T. start: tokens that the caches hold already.
    Raises UserError where nothing or less than nothing is asked for.
    """
    batch, longest = tokens.shape
    sizes = [longest] * batch if lengths is None else list(lengths)
    if chunk < 1 or start < 0 or longest < 1 or len(sizes) != batch or not all(1 <= n <= longest for n in sizes):
        raise UserError(
            f"prefill takes pieces of 1 token or more and rows of 1 to {longest} tokens, not chunk = {chunk}, "
            f"start = {start}, lengths = {sizes}."
        )
    hidden = tokens.new_empty(batch, model.spec.d_model, dtype=model.embed.dtype)
    kept, experts = Kept(), list[list[Tensor]]()
    ends = torch.tensor(sizes, device=tokens.device)
    pieces = -(-longest // chunk)
    for piece in range(pieces):  # of nearly equal size: a last piece of a few tokens would say little about lines
        first, stop = (longest * i // pieces for i in (piece, piece + 1))
        at = torch.arange(first, stop, device=tokens.device)
        positions = torch.where(at < ends[:, None], start + at, -1)
        real = tuple(max(0, min(n, stop) - first) for n in sizes)
        routing = Routing() if record_experts else None
        prompt = Prompt(start + first, real, sparse, kept)
        out = model(tokens[:, first:stop], positions, caches, start + stop, routing, prompt=prompt)
        for row, n in enumerate(sizes):
            if first < n <= stop:
                hidden[row] = out[row, n - 1 - first]
        if routing is not None:
            experts.append(routing.experts)
    joined = [torch.cat(parts, 1) for parts in zip(*experts, strict=True)] if record_experts else None
    return Prefilled(hidden, joined, kept)
