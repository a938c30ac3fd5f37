"""Caches with room for fewer tokens than there are: what is evicted is gone, and its memory with it.

    Ring    the first `sinks` tokens and the last `window`      (StreamingLLM, arXiv 2309.17453)
    Voted   the newest block, and of what is older what the block before it looked at, for each key head
            (SnapKV's vote, arXiv 2404.14469, taken at the end of every block instead of once after the prompt)

Positions stay the original ones, and a key keeps the rotation that it was stored with; StreamingLLM's code counts
positions within the cache instead. What is kept depends on the text alone: not on the batch, nor on how a prompt
was cut into pieces (`Voted` wants pieces that do not cross a block, and says so).

A call's real tokens stand at consecutive positions at the start of its row, padding behind them. Both kinds take
tensors [B,T,K,width]: keys and values of K heads, or MLA's latent as one head. `update` writes and returns what may
be read, `seen` says by whom. To the engine such a cache is a state: it can be copied, not cut back to an earlier token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from trivet.config import UserError
from trivet.model.cache import RowStore

POOL = 5  # neighbours that share a vote, as in SnapKV: what stands beside a needle is kept with it


class Ring(RowStore):
    """Token p lives in slot p while p < sinks, else in slot sinks + (p - sinks) mod window; the last slot is spare."""

    def __init__(
        self,
        heads: int,
        widths: Sequence[int],
        rows: int,
        window: int,
        sinks: int,
        like: tuple[torch.dtype, torch.device],
    ) -> None:
        dtype, device = like
        self.window, self.sinks, self.slots = window, sinks, window + sinks
        shape = (rows, heads, self.slots + 1)
        self.tensors = tuple(torch.zeros((*shape, width), dtype=dtype, device=device) for width in widths)

    def update(self, new: Sequence[Tensor], positions: Tensor, span: int) -> tuple[Tensor, ...]:
        """Write new [B,T,K,w] at positions [B,T]; return what may be read, [B,K,S,w] each: the ring, then new ones."""
        batch, length = positions.shape
        kept = self._kept = min(self.slots, span)
        if length == 1:
            self._write(new, positions, positions >= 0)
            return tuple(t[:batch, :, :kept] for t in self.tensors)
        fresh = [x.transpose(1, 2).to(t.dtype) for x, t in zip(new, self.tensors, strict=True)]  # [B,K,T,w]
        read = tuple(torch.cat((t[:batch, :, :kept], x), 2) for t, x in zip(self.tensors, fresh, strict=True))
        last = positions.amax(1, keepdim=True)
        self._write(new, positions, (positions >= 0) & ((positions < self.sinks) | (positions > last - self.window)))
        return read

    def _write(self, new: Sequence[Tensor], positions: Tensor, stays: Tensor) -> None:
        ring = self.sinks + (positions - self.sinks) % self.window
        slot = torch.where(positions < self.sinks, positions, ring).masked_fill(~stays, self.slots)
        rows = torch.arange(len(positions), device=positions.device).unsqueeze(-1)
        for store, x in zip(self.tensors, new, strict=True):
            store[rows, :, slot] = x.to(store.dtype)

    def seen(self, positions: Tensor) -> Tensor:
        """bool [B,1,T,S]: which of what `update` just returned each query sees; all see something."""
        length = positions.shape[1]
        slot = torch.arange(self._kept, device=positions.device)
        if length == 1:  # the ring is full, or its slots are positions
            return (slot <= positions.clamp_min(0).unsqueeze(-1)).unsqueeze(1)
        first = positions[:, :1]  # before this call the row had tokens 0..first-1
        newest = first - 1 - (first - 1 - slot) % self.window
        held = torch.where(slot < self.sinks, slot, newest)  # [B,kept] the position in each slot
        real = (held < first) & ((slot < self.sinks) | (held >= self.sinks))
        at = positions.unsqueeze(-1)
        old = real.unsqueeze(1) & self._within(at, held.unsqueeze(1))
        order = torch.arange(length, device=positions.device)
        fresh = (order <= order.unsqueeze(-1)) & self._within(at, positions.unsqueeze(1))
        return torch.cat((old, fresh), -1).unsqueeze(1)

    def _within(self, query: Tensor, key: Tensor) -> Tensor:
        return (key > query - self.window) | ((key >= 0) & (key < self.sinks))


class Voted(RowStore):
    """Blocks of `block` tokens: slots 0..block-1 hold the newest one, the rest what was kept, oldest first.

    When a block is full, its queries' attention weights, summed over them and over the heads that share a key head,
    say which of the older tokens stay; the block itself stays until the next one is full.
    """

    def __init__(
        self,
        heads: int,
        widths: Sequence[int],
        rows: int,
        slots: int,
        block: int,
        like: tuple[torch.dtype, torch.device],
    ) -> None:
        dtype, device = like
        self.block, self.slots = block, slots
        stores = [torch.zeros(rows, heads, slots + 1, width, dtype=dtype, device=device) for width in widths]
        self.tensors = (*stores, torch.zeros(rows, heads, slots, dtype=torch.float32, device=device))

    def update(self, new: Sequence[Tensor], positions: Tensor, span: int) -> tuple[Tensor, ...]:
        """As a ring's. Raises UserError where a call crosses a block. Costs a GPU a host sync."""
        batch, length = positions.shape
        first, last = positions[:, 0], positions.amax(1)
        if length > 1 and bool((first // self.block != last // self.block).any()):
            raise UserError(
                f"This cache takes tokens in blocks: a call must not cross a multiple of {self.block} positions, and "
                f"one reaches from {int(first.min())} to {int(last.max())}."
            )
        opens = first % self.block == 0
        self._choose((opens & (first > 0)).nonzero().squeeze(-1), first)
        votes = self.tensors[-1]
        votes[:batch] *= (~opens)[:, None, None]
        slot = torch.where(positions < 0, self.slots, positions % self.block)
        rows = torch.arange(batch, device=positions.device).unsqueeze(-1)
        for store, x in zip(self.tensors[:-1], new, strict=True):
            store[rows, :, slot] = x.to(store.dtype)
        self._read = min(self.slots, self.block + span)
        return tuple(t[:batch, :, : self._read] for t in self.tensors[:-1])

    def _choose(self, which: Tensor, first: Tensor) -> None:
        """Make room for the next block in the rows `which`, whose tokens 0..first-1 are all there were."""
        if not len(which):
            return
        room, index = self.slots - self.block, torch.arange(self.slots, device=which.device)
        old = (first[which] - self.block).clamp_max(room).view(-1, 1, 1)  # kept until now, besides the block
        votes = self.tensors[-1][which]
        pooled = F.avg_pool1d(votes[..., self.block :], POOL, 1, POOL // 2)
        score = torch.cat((torch.full_like(votes[..., : self.block], float("inf")), pooled), -1)
        exists = (index < self.block) | (index < self.block + old)  # [w,1,slots]
        chosen = score.masked_fill(~exists, -1.0).topk(room).indices  # [w,K,room]
        # In the order of the text: what was kept, the block, and last the slots that hold nothing.
        place = torch.where(index < self.block, index + self.slots, index) + 2 * self.slots * ~exists
        order = place.expand_as(score).gather(-1, chosen).argsort(-1)
        chosen = chosen.gather(-1, order)
        for store in self.tensors[:-1]:
            mine = store[which]
            mine[:, :, self.block : self.slots] = mine.gather(
                2, chosen.unsqueeze(-1).expand(-1, -1, -1, mine.shape[-1])
            )
            store[which] = mine

    def seen(self, positions: Tensor) -> Tensor:
        """bool [B,1,T,S], as a ring's."""
        at = positions.clamp_min(0).unsqueeze(-1)  # [B,T,1]; a padding query sees slot 0, result unused
        slot = torch.arange(self._read, device=positions.device)
        kept = slot - self.block < (at // self.block * self.block).clamp_max(self.slots - self.block)
        return torch.where(slot < self.block, slot <= at % self.block, kept).unsqueeze(1)

    def vote(self, weights: Tensor, positions: Tensor) -> None:
        """weights [B,H,T,S]: attention of a call's queries to what `update` returned."""
        votes = self.tensors[-1]
        real = (positions >= 0)[:, None, :, None]
        cast = weights.masked_fill(~real, 0.0).float().sum(2)  # [B,H,S]
        votes[: len(cast), :, : cast.shape[-1]] += cast.unflatten(1, (votes.shape[1], -1)).sum(2)
