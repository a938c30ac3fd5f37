"""Packed rows taken apart: a batch's documents as stacks of whole documents of nearly one length.

Attention over a packed row computes all T^2 pairs and masks those between documents. With many short
documents in long rows most of that work is for nothing; document by document it is the sum of n^2
(varlen attention). A document is filled up at its end to its stack's length, where causal order hides
the filling, so no mask is needed. Both ways are a gather, forward and backward.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

WORTH_IT = 0.5  # share of the rows' pairs of tokens below which attention by document is faster


@dataclass
class Apart:
    """A batch of packed documents as stacks of whole documents, all of nearly one length in each.

    shapes: (documents, tokens) of each stack; documents are filled up at their end.
    order: [M] where each slot of the stacks, one after the other, finds its token in the flat batch.
    holes: slots that are filling. back: [N] the slot of each token. padding: tokens without a slot.
    """

    shapes: list[tuple[int, int]]
    order: Tensor
    holes: Tensor
    back: Tensor
    padding: Tensor

    @property
    def pairs(self) -> int:
        return sum(n * length**2 for n, length in self.shapes)

    @classmethod
    def of(cls, positions: Tensor) -> Apart:
        """positions [B,T]: 0 starts a document, -1 is padding. Stacks hold lengths within a factor of 1.5."""
        at = positions.numpy()
        real = at >= 0
        begins = real & (at == 0)
        begins[:, 0] |= real[:, 0]
        flat, starts = real.ravel(), np.flatnonzero(begins)
        lengths = np.bincount(begins.ravel().cumsum()[flat] - 1, minlength=len(starts))
        stacks = np.round(np.log(lengths) / math.log(1.5)).astype(int)
        shapes, order, holes, slot = [], [], [], 0
        back = np.zeros(flat.size, np.int64)
        for stack in np.unique(stacks):
            first, size = starts[stacks == stack], lengths[stacks == stack]
            token = np.arange(size.max())
            there = token < size[:, None]  # [documents, tokens]
            place = np.where(there, first[:, None] + token, 0).ravel()
            back[place[there.ravel()]] = slot + np.flatnonzero(there.ravel())
            holes.append(slot + np.flatnonzero(~there.ravel()))
            shapes.append(there.shape)
            order.append(place)
            slot += there.size
        joined = (np.concatenate(order), np.concatenate(holes), back, np.flatnonzero(~flat))
        return cls(shapes, *(torch.from_numpy(a) for a in joined))

    def split(self, x: Tensor) -> list[Tensor]:
        """[B,T,...] -> one [documents, tokens, ...] a stack, zeros where there is no token."""
        slots = cast(Tensor, _Rearrange.apply(x.flatten(0, 1), self.order, self.holes, self.back, self.padding))
        return [part.unflatten(0, shape) for part, shape in zip(self._cut(slots), self.shapes, strict=True)]

    def join(self, stacks: list[Tensor], batch: int) -> Tensor:
        """The inverse: stacks -> [B,T,...], zeros at padding."""
        slots = torch.cat([stack.flatten(0, 1) for stack in stacks])
        return cast(Tensor, _Rearrange.apply(slots, self.back, self.padding, self.order, self.holes)).unflatten(
            0, (batch, -1)
        )

    def _cut(self, slots: Tensor) -> tuple[Tensor, ...]:
        return slots.split([n * length for n, length in self.shapes])


class _Rearrange(torch.autograd.Function):
    """x[index] with zeros at holes, where index is one to one: the gradient is a gather as well."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, holes: Tensor, back: Tensor, back_holes: Tensor) -> Tensor:
        ctx.save_for_backward(back, back_holes)
        return x.index_select(0, index).index_fill_(0, holes, 0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        back, back_holes = ctx.saved_tensors
        return grads[0].index_select(0, back).index_fill_(0, back_holes, 0), None, None, None, None
