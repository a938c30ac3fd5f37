"""Packed rows taken apart: a batch's documents as stacks of whole documents of nearly one length.

Attention over a packed row computes all T^2 pairs and masks those between documents. With many short
documents in long rows most of that work is for nothing; document by document it is the sum of n^2
(varlen attention). A document is filled up at its end to its stack's length, where causal order hides
the filling, so no mask is needed.

A document may branch: where positions fall back to p > 0, what follows goes on from the first p tokens of
its document instead of from the token before it. So the answers to one prompt share it in a row,

    prompt answer other third          positions  0 1 2 3 4 | 5 6 7 | 5 6 | 5 6 7 8

and whatever looks at one token at a time (products, norms, experts) computes the prompt once. What mixes tokens
sees strands: each branch behind the tokens that it goes on from. Of those only the branch's own results are kept;
a shared token's are those of the piece that it lies in.

Every way is a gather. Backward is one, too, but for shared tokens, whose gradient is the sum over their strands.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

WORTH_IT = 0.5  # share of the rows' pairs of tokens below which attention by document is faster


@dataclass
class Apart:
    """A batch of packed documents as stacks of strands (whole documents, where none branches) of nearly one length.

    shapes: (strands, tokens) of each stack; strands are filled up at their end.
    order: [M] where each slot of the stacks, one after the other, finds its token in the flat batch.
    holes: slots that are filling. back: [N] the slot of each token. padding: tokens without a slot.
    others: slots whose results nobody takes, because they are filling or of a token that a branch shares.
    slots, bags: all slots of the first token, of the second, ..., and where each one's begin [N]; no slots where no
        token is shared.
    """

    shapes: list[tuple[int, int]]
    order: Tensor
    holes: Tensor
    back: Tensor
    padding: Tensor
    others: Tensor
    slots: Tensor
    bags: Tensor

    @property
    def pairs(self) -> int:
        return sum(n * length**2 for n, length in self.shapes)

    @property
    def branches(self) -> bool:
        return len(self.slots) > 0

    @classmethod
    def of(cls, positions: Tensor) -> Apart:
        """positions [B,T]: 0 starts a document, -1 is padding, a fall to p > 0 branches off after p tokens.

        Stacks hold lengths within a factor of 1.5. Raises ValueError for a branch longer than what it branches off.
        """
        at = positions.numpy()
        real = at >= 0
        previous = np.pad(at[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
        begins, flat = real & ((at <= previous) | (previous < 0)), real.ravel()
        starts = np.flatnonzero(begins)  # of the pieces, each of which lies in one
        own = np.bincount(begins.ravel().cumsum()[flat] - 1, minlength=len(starts))
        row, shared = starts // at.shape[1], at.ravel()[starts]
        whole = (shared == 0) | (np.concatenate(([-1], row[:-1])) != row)  # begins a document, instead of a branch
        shared = np.where(whole, 0, shared)
        trunk = np.maximum.accumulate(np.where(whole, np.arange(len(starts)), 0))  # the piece it branches off
        if (shared > own[trunk]).any():
            worst = int(np.argmax(shared > own[trunk]))
            raise ValueError(
                f"positions fall to {shared[worst]} in a document whose first piece has {own[trunk][worst]} tokens"
            )
        lengths = shared + own
        stacks = np.round(np.log(lengths) / math.log(1.5)).astype(int)
        shapes, order, holes, others, slot = [], [], [], [], 0
        back = np.zeros(flat.size, np.int64)
        for stack in np.unique(stacks):
            mine = stacks == stack
            before, size = shared[mine, None], lengths[mine, None]
            token = np.arange(size.max())
            there = token < size  # [strands, tokens]
            kept = there & (token >= before)
            place = np.where(token < before, starts[trunk[mine], None], starts[mine, None] - before) + token
            place = np.where(there, place, 0)
            back[place[kept]] = slot + np.flatnonzero(kept)
            holes.append(slot + np.flatnonzero(~there))
            others.append(slot + np.flatnonzero(~kept))
            shapes.append(there.shape)
            order.append(place.ravel())
            slot += there.size
        joined, filling = np.concatenate(order), np.concatenate(holes)
        filled = np.setdiff1d(np.arange(slot) if shared.any() else [], filling).astype(np.int64)
        by_token = filled[np.argsort(joined[filled], kind="stable")]
        counts = np.bincount(joined[filled], minlength=flat.size)
        arrays = (
            joined,
            filling,
            back,
            np.flatnonzero(~flat),
            np.concatenate(others),
            by_token,
            counts.cumsum() - counts,
        )
        return cls(shapes, *(torch.from_numpy(a) for a in arrays))

    def to(self, device: torch.device | str) -> Apart:
        return Apart(self.shapes, *(getattr(self, field.name).to(device) for field in fields(self)[1:]))

    def split(self, x: Tensor) -> list[Tensor]:
        """[B,T,...] -> one [strands, tokens, ...] a stack, zeros where there is no token."""
        slots = cast(
            Tensor, _Rearrange.apply(x.flatten(0, 1), self.order, self.holes, self.back, self.padding, self.slots, self.bags)
        )  # fmt: skip
        return [part.unflatten(0, shape) for part, shape in zip(self._cut(slots), self.shapes, strict=True)]

    def join(self, stacks: list[Tensor], batch: int) -> Tensor:
        """The way back: stacks -> [B,T,...], zeros at padding."""
        slots, none = torch.cat([stack.flatten(0, 1) for stack in stacks]), self.slots[:0]
        return cast(
            Tensor, _Rearrange.apply(slots, self.back, self.padding, self.order, self.others, none, none)
        ).unflatten(0, (batch, -1))

    def _cut(self, slots: Tensor) -> tuple[Tensor, ...]:
        return slots.split([n * length for n, length in self.shapes])


class _Rearrange(torch.autograd.Function):
    """x[index] with zeros at holes. Where index is one to one the gradient is a gather as well; where it is not, a sum
    over each one's slots."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, index: Tensor, holes: Tensor, back: Tensor, back_holes: Tensor, slots: Tensor, bags: Tensor
    ) -> Tensor:
        ctx.save_for_backward(back, back_holes, slots, bags)
        return x.index_select(0, index).index_fill_(0, holes, 0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (back, back_holes, slots, bags) = grads, ctx.saved_tensors
        if len(slots):
            summed = F.embedding_bag(slots, grad.flatten(1), bags, mode="sum").view(-1, *grad.shape[1:])
        else:
            summed = grad.index_select(0, back).index_fill_(0, back_holes, 0)
        return summed, *(None,) * 6
