"""Caches that keep every token in fewer bytes.

    Int8KV, Int8Latent   x ~ s round(x / s),  s = max|x| / 127 for each token and head; a latent and its rotated key
                         have a scale each. The error of a number is at most half a step s, and the scale's own
                         rounding to fp16
    LowRank              MLA's latent in other coordinates, z = c E, the important ones first, of which older tokens
                         lose the last ones: c ~ z[:r] D[:r] with r by age; E and D are `engine/calibrate.py`'s

`LowRank` is our own; the nearest published ideas are Palu (arXiv 2407.21118: ranks fixed at load time) and
MatryoshkaKV (arXiv 2410.14731: nested ranks, trained). Its coordinates lie in bands: the first few of every token, and
of each further band a ring over the newest tokens, so that a token loses a band by being overwritten, and nothing is
ever moved. Ages count from the start of the query's block, so they do not depend on how a prompt is cut into
pieces, as long as no piece crosses a block.

Between calls a layer holds what is said here; while it works it has one layer's cache in full, in the model's type.
Left out: products on the 8-bit numbers themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from trivet.config import UserError
from trivet.model.cache import KVCache, LatentCache, LayerCache
from trivet.spec import GQA, MLA

SCALE = torch.float16  # of a scale
LEVELS = 127


def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., w] -> int8 [..., w] and its scale [...]."""
    scale = (x.float().abs().amax(-1) / LEVELS).to(SCALE)
    steps = x.float() / scale.float().clamp_min(torch.finfo(SCALE).tiny).unsqueeze(-1)
    return steps.round().clamp(-LEVELS, LEVELS).to(torch.int8), scale


def restore(steps: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return steps.to(dtype) * scale.to(dtype).unsqueeze(-1)


class Int8KV(KVCache):
    """Keys and values int8 [rows,K,slots+1,hd], their scales [rows,K,slots+1]."""

    def __init__(self, spec: GQA, rows: int, slots: int, dtype: torch.dtype, device: torch.device) -> None:
        shape, self.dtype = (rows, spec.kv_heads, slots + 1), dtype
        steps = [torch.zeros(*shape, spec.head_dim, dtype=torch.int8, device=device) for _ in range(2)]
        self.tensors = (*steps, *(torch.zeros(shape, dtype=SCALE, device=device) for _ in range(2)))

    def update(self, new: Sequence[Tensor], positions: Tensor, span: int) -> tuple[Tensor, ...]:
        (k, k_scale), (v, v_scale) = (quantise(x) for x in new)
        k, v, k_scale, v_scale = super().update((k, v, k_scale, v_scale), positions, span)
        return restore(k, k_scale, self.dtype), restore(v, v_scale, self.dtype)


class Int8Latent(LatentCache):
    """Latent and rotated key int8 [rows,slots+1,C+R], a scale of each [rows,slots+1,2]."""

    def __init__(self, spec: MLA, rows: int, slots: int, dtype: torch.dtype, device: torch.device) -> None:
        self.split, self.dtype = (spec.kv_rank, spec.rope.dims), dtype
        steps = torch.zeros(rows, slots + 1, sum(self.split), dtype=torch.int8, device=device)
        self.tensors = (steps, torch.zeros(rows, slots + 1, 2, dtype=SCALE, device=device))

    def update(self, latent: Tensor, positions: Tensor, span: int) -> Tensor:
        rows = torch.arange(len(positions), device=positions.device).unsqueeze(-1)
        parts = [quantise(part) for part in latent.split(self.split, -1)]
        steps, scales = self.tensors
        steps[rows, positions] = torch.cat([part for part, _ in parts], -1)
        scales[rows, positions] = torch.stack([scale for _, scale in parts], -1)
        read = steps[: len(positions), :span].split(self.split, -1)
        scale = scales[: len(positions), :span].unbind(-1)
        return torch.cat([restore(x, s, self.dtype) for x, s in zip(read, scale, strict=True)], -1)


# ---------------------------------------------------------------------------------- ranks by age
class Basis(NamedTuple):
    """Coordinates of a latent, the important ones first: z = c into, c = z back, each [C,C]."""

    into: Tensor
    back: Tensor


class Band(NamedTuple):
    """Coordinates start..stop-1 of a latent, which the newest `age` tokens before a block have, and its own.

    slots: of their ring, age + block or as many as there can be tokens.
    """

    start: int
    stop: int
    age: int
    slots: int


class LowRank(LatentCache):
    """The first `rank` coordinates and the rotated key of every token [rows,slots+1,rank+R], and a ring a band
    [rows,band slots+1,stop-start], in which token p is at p mod band slots."""

    slot_dim: int | None = None  # bands forget, so a row can't be cut back to an earlier token

    def __init__(
        self, spec: MLA, basis: Basis, rank: int, bands: Sequence[Band], block: int, rows: int, slots: int,
        like: tuple[torch.dtype, torch.device],
    ) -> None:  # fmt: skip
        dtype, device = like
        self.spec, self.rank, self.bands, self.block = spec, rank, tuple(bands), block
        self.into, self.back = (t.to(device, dtype) for t in basis)
        shapes = [(slots + 1, rank + spec.rope.dims), *((b.slots + 1, b.stop - b.start) for b in bands)]
        self.tensors = tuple(torch.zeros(rows, *shape, dtype=dtype, device=device) for shape in shapes)

    def update(self, latent: Tensor, positions: Tensor, span: int) -> Tensor:
        """As LatentCache's, but what is returned is in the basis's coordinates: zero where a token has lost them.

        Raises UserError where a call crosses a block.
        """
        batch, rope = len(positions), self.spec.rope.dims
        first, last = positions[:, :1], positions.amax(1, keepdim=True)
        if positions.shape[1] > 1 and bool((first // self.block != last // self.block).any()):
            raise UserError(
                f"This cache ages tokens by blocks: a call must not cross a multiple of {self.block} positions."
            )
        rows = torch.arange(batch, device=positions.device).unsqueeze(-1)
        c, turned = latent.split((self.spec.kv_rank, rope), -1)
        z, (base, *rings) = c.to(self.into.dtype) @ self.into, self.tensors
        base[rows, positions] = torch.cat((z[..., : self.rank], turned.to(base.dtype)), -1)
        read = base.new_zeros(batch, span + 1, self.spec.kv_rank + rope)  # one more for what is not there
        known = base[:batch, :span]
        read[:, :span, : self.rank], read[:, :span, self.spec.kv_rank :] = known.split((self.rank, rope), -1)
        for band, ring in zip(self.bands, rings, strict=True):
            size = band.slots
            ring[rows, torch.where(positions < 0, size, positions % size)] = z[..., band.start : band.stop]
            at = last - (last - torch.arange(size, device=positions.device)) % size  # [B,size] who is in each slot
            has = at >= (first // self.block * self.block - band.age).clamp_min(0)
            read[rows, torch.where(has, at, span), band.start : band.stop] = ring[:batch, :size]
        return read[:, :span]

    def copy_from(self, source: LayerCache, rows: int) -> None:
        for i, (mine, theirs) in enumerate(zip(self.tensors, source.tensors, strict=True)):
            slots = min(mine.shape[1], theirs.shape[1] - (i == 0))  # the spare slot stays where it is
            mine[:rows, :slots] = theirs[:rows, :slots]
