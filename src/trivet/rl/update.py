"""Episodes of any length as packed rows, longest first, and what the loss needs to know of each token.

First fit decreasing: the longest row first, each into the first line with room. All tokens that the
model wrote are also listed flat, with the number of their sequence, so the loss never sees padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trivet.agent.loop import Row
from trivet.config import UserError
from trivet.train.data import IGNORE, Document, lay_out


@dataclass
class Packed:
    """A microbatch. tokens, positions, wanted [B,T]; the rest [N], in the order of `wanted`."""

    tokens: Tensor
    positions: Tensor  # restart at 0 with each episode, -1: padding
    wanted: Tensor  # True where the next token was written by the model
    targets: Tensor  # that token
    sequence: Tensor  # the row (of the batch) that it belongs to
    sampler: Tensor  # its log-probability in the engine
    old: Tensor | None = None  # in the trainer, before the batch's first update
    reference: Tensor | None = None  # in the starting model
    experts: list[Tensor] | None = None  # that the first update's forward chose, [B,T,k] a layer

    def to(self, device: torch.device | str) -> Packed:
        return Packed(
            self.tokens.to(device), self.positions.to(device), self.wanted.to(device), self.targets.to(device),
            self.sequence.to(device), self.sampler.to(device),
        )  # fmt: skip


def pack(rows: Sequence[Row], lines: int, length: int) -> list[Packed]:
    """Microbatches of at most `lines` x `length` that hold every row once. UserError for one too long.

    A row ends with its last trained token: what follows (a tool result that nobody read) has no loss.
    """
    rows = [_trim(row) for row in rows]
    order = sorted(range(len(rows)), key=lambda i: (-len(rows[i].ids), i))
    if rows and len(rows[order[0]].ids) > length + 1:
        raise UserError(
            f"An episode has {len(rows[order[0]].ids)} tokens, more than a row takes ({length + 1}): raise rl.length."
        )
    filled: list[list[int]] = []
    room: list[int] = []
    for i in order:
        need = len(rows[i].ids) - 1  # the last token is only ever a target
        line = next((k for k, free in enumerate(room) if free >= need), None)
        if line is None:
            line = len(filled)
            filled.append([])
            room.append(length)
        filled[line].append(i)
        room[line] -= need
    starts = range(0, len(filled), lines)
    return [_microbatch(rows, filled[s : s + lines], length - min(room[s : s + lines])) for s in starts]


def _trim(row: Row) -> Row:
    end = max((i + 1 for i, trained in enumerate(row.trained) if trained), default=0)
    if end == 0:
        raise ValueError("a row without a trained token has no place in an update")
    return Row(row.ids[:end], row.trained[:end], row.logprobs[:end])


def _microbatch(rows: Sequence[Row], lines: Sequence[Sequence[int]], length: int) -> Packed:
    documents = [[Document(list(rows[i].ids), list(rows[i].trained)) for i in line] for line in lines]
    batch = lay_out(documents, length)
    sequence: list[int] = []
    sampler: list[float] = []
    for line in lines:
        for i in line:
            logprobs = [p for p, trained in zip(rows[i].logprobs[1:], rows[i].trained[1:], strict=True) if trained]
            sampler += logprobs
            sequence += [i] * len(logprobs)
    wanted = batch.targets != IGNORE
    return Packed(
        batch.tokens, batch.positions, wanted, batch.targets[wanted], torch.tensor(sequence), torch.tensor(sampler)
    )
