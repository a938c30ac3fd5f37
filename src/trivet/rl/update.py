"""Episodes of any length as packed rows, longest first, and what the loss needs to know of each token.

First fit decreasing: the longest row first, each into the first line with room. All tokens that the
model wrote are also listed flat, with the number of their sequence, so the loss never sees padding.

Rows with the same prompt, which a group's are, lie in a line one after the other and share it: it is there once,
and each but the first goes on from it (branches, see model/packed.py). Only the prompt's last token is there for each
of them, because it is where their first ones are predicted. So a prompt costs once what it cost a group times,
but for what mixes tokens where that is done strand by strand.

A batch may be dealt to several minibatches, each an optimizer step of its own: longest first, forth and
back, so that they are of a size. Advantages are known by then, so a group need not stay together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from trivet.agent.loop import Row
from trivet.config import UserError
from trivet.model.packed import Apart
from trivet.train.data import IGNORE, Document, first_fit, lay_out
from trivet.train.losses import Sets


@dataclass
class Packed:
    """A microbatch. tokens, positions, wanted [B,T]; the rest [N], in the order of `wanted`."""

    tokens: Tensor
    positions: Tensor  # restart at 0 with each episode or fall back to the end of its prompt, -1: padding
    wanted: Tensor  # True where the next token was written by the model
    targets: Tensor  # that token
    sequence: Tensor  # the row (of the batch) that it belongs to
    sampler: Tensor  # its log-probability in the engine
    sets: Sets | None = None  # what it was drawn from, if not from the whole vocabulary
    experts: list[Tensor] | None = None  # to be replayed, [B,T,k] a MoE layer; -1: not known
    stale: Tensor | None = None  # which of them older weights sampled; None: none
    apart: Apart | None = None  # how the lines are taken apart, where rows share a prompt
    old: Tensor | None = None  # in the trainer, before the batch's first update
    reference: Tensor | None = None  # in the starting model
    scale: Tensor | None = None  # what the surrogate of each is multiplied by; None: 1

    def to(self, device: torch.device | str) -> Packed:
        return Packed(
            self.tokens.to(device), self.positions.to(device), self.wanted.to(device), self.targets.to(device),
            self.sequence.to(device), self.sampler.to(device), self.sets and self.sets.to(device),
            self.experts and [layer.to(device) for layer in self.experts],
            None if self.stale is None else self.stale.to(device), self.apart and self.apart.to(device),
        )  # fmt: skip


def deal(rows: Sequence[Row], minibatches: int) -> list[list[int]]:
    """Every row's number once, in at most so many lists. The same rows are always dealt alike."""
    order = sorted(range(len(rows)), key=lambda i: (-len(rows[i].ids), i))
    count = min(minibatches, len(rows))
    dealt: list[list[int]] = [[] for _ in range(count)]
    for turn, i in enumerate(order):
        around, place = divmod(turn, count)
        dealt[count - 1 - place if around % 2 else place].append(i)
    return dealt


def pack(
    rows: Sequence[Row], lines: int, length: int, share: bool = True, rank: int = 0, world: int = 1
) -> list[Packed]:
    """Microbatches of at most `lines` x `length` tokens that hold every row once. UserError for one too long.

    Of several processes each gets every `world`-th line, so that all have about as much to do.
    The longest line is in the first one, so what doesn't fit into memory fails at once.
    A row ends with its last trained token: what follows (a tool result that nobody read) has no loss.
    share: rows with the same prompt share it; then lines are fewer and longer, so that one takes a whole group.
    """
    ends = [_end(row) for row in rows]
    filled, at_once = _fill(rows, ends, lines, length, share, world)
    mine = filled[rank::world]
    return [_microbatch(rows, ends, mine[start : start + at_once]) for start in range(0, len(mine), at_once)]


def turns(rows: Sequence[Row], lines: int, length: int, share: bool, world: int) -> int:
    """How many microbatches the first of `world` processes has, which has the most."""
    filled, at_once = _fill(rows, [_end(row) for row in rows], lines, length, share, world)
    return math.ceil(len(filled[::world]) / at_once)


Line = Sequence[tuple[int, int]]  # rows, and how many tokens of each are already there


def _fill(
    rows: Sequence[Row], ends: Sequence[int], lines: int, length: int, share: bool, world: int
) -> tuple[list[Line], int]:
    """All lines, the longest first, and how many of them a microbatch takes."""
    if rows and max(ends) > length + 1:
        raise UserError(f"An episode has {max(ends)} tokens, more than a row takes ({length + 1}): raise rl.length.")
    shared = [row.trained.index(True) - 1 if share else 0 for row in rows]
    room = min(lines * length, sum(ends) // world) if share else length
    families = _families(rows, ends, shared, max(room, length))
    needs = [sum(ends[i] - 1 - before for i, before in family) for family in families]
    longest = max([length, *needs])
    filled: list[Line] = [[member for f in line for member in families[f]] for line in first_fit(needs, longest)]
    return filled, lines * length // longest


def _families(rows: Sequence[Row], ends: Sequence[int], shared: Sequence[int], length: int) -> list[Line]:
    """Rows with one prompt, the longest first, as many as a line takes. The last token is only ever a target."""
    alike: dict[tuple[int, ...], list[int]] = {}
    for i in sorted(range(len(rows)), key=lambda i: (-ends[i], i)):
        alike.setdefault(rows[i].ids[: shared[i]] if shared[i] > 0 else (-1, i), []).append(i)
    families: list[Line] = []
    for group in alike.values():
        family, room = [(group[0], 0)], length - (ends[group[0]] - 1)
        for i in group[1:]:
            before = shared[i]
            if ends[i] - 1 - before > room:
                families.append(family)
                family, before, room = [], 0, length
            family.append((i, before))
            room -= ends[i] - 1 - before
        families.append(family)
    return families


def _end(row: Row) -> int:
    end = max((i + 1 for i, trained in enumerate(row.trained) if trained), default=0)
    if end == 0:
        raise ValueError("a row without a trained token has no place in an update")
    return end


def _microbatch(rows: Sequence[Row], ends: Sequence[int], lines: Sequence[Line]) -> Packed:
    length = max(sum(ends[i] - 1 - before for i, before in line) for line in lines)
    batch = lay_out(
        [
            [Document(list(rows[i].ids[: ends[i]]), list(rows[i].trained[: ends[i]]), before) for i, before in line]
            for line in lines
        ],
        length,
    )
    members = [i for line in lines for i, _ in line]
    sequence: list[int] = []
    sampler: list[float] = []
    for i in members:
        logprobs = [p for p, trained in zip(rows[i].logprobs[1:], rows[i].trained[1:], strict=True) if trained]
        sampler += logprobs
        sequence += [i] * len(logprobs)
    wanted = batch.targets != IGNORE
    return Packed(
        batch.tokens, batch.positions, wanted, batch.targets[wanted], torch.tensor(sequence), torch.tensor(sampler),
        _sets([rows[i] for i in members]), _experts(rows, ends, lines, length), _stale([rows[i] for i in members]),
        Apart.of(batch.positions) if any(before for line in lines for _, before in line) else None,
    )  # fmt: skip


def _sets(rows: Sequence[Row]) -> Sets | None:
    """What the trained tokens were drawn from, in their order; None where no row recorded it."""
    if not any(row.sets for row in rows):
        return None
    drawn: list[np.ndarray] = []
    for row in rows:
        found = {start + i: ids[a:b] for start, (ids, ends) in row.sets for i, (a, b) in enumerate(pairwise(ends))}
        drawn += [found[at] for at, trained in enumerate(row.trained) if trained]
    offsets = np.cumsum([0, *map(len, drawn)])
    return Sets(torch.from_numpy(np.concatenate(drawn)), torch.from_numpy(offsets))


def _stale(rows: Sequence[Row]) -> Tensor | None:
    """Which trained tokens older weights sampled, in their order."""
    if not any(row.stale for row in rows):
        return None
    marks = [zip(row.stale or (False,) * len(row.ids), row.trained, strict=True) for row in rows]
    return torch.tensor([stale for row in marks for stale, trained in row if trained])


def _experts(rows: Sequence[Row], ends: Sequence[int], lines: Sequence[Line], length: int) -> list[Tensor] | None:
    """[B,T,k] a MoE layer, the experts that the engine recorded, -1 elsewhere; None where no row has any.

    A position that several completions of an episode computed has those of the first, which sampled after it.
    """
    recorded = [layers for line in lines for i, _ in line for layers in rows[i].experts]
    if not recorded:
        return None
    whole = [np.full((len(lines), length, layer.shape[-1]), -1) for layer in recorded[0]]
    for b, line in enumerate(lines):
        first = 0
        for i, before in line:
            for table, *found in zip(whole, *rows[i].experts, strict=True):
                for known in found:
                    known = known[before : ends[i] - 1]
                    place = table[b, first : first + len(known)]
                    place[:] = np.where(place < 0, known, place)
            first += ends[i] - 1 - before
    return [torch.from_numpy(table) for table in whole]
