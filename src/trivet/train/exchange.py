"""Matrices that are cut through by FSDP (`parallel.py`), whole for a while, because Muon works on whole ones."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from trivet.train.parallel import Part


class Exchange:
    """Matrices that are cut through, whole for a while: each of n processes gets every n-th of a list and works on it.

    One all-to-all there and one back, so that each matrix is worked on once; replicas each do the same work.
    """

    def __init__(self, pieces: Sequence[Tensor], parts: Sequence[Part]) -> None:
        """pieces: what this process holds of each matrix, of the same list in all processes of the group."""
        self.pieces, self.parts, self.group = pieces, parts, parts[0].group
        self.mine = range(self.group.rank(), len(parts), self.group.size())

    def there(self) -> list[Tensor]:
        """The whole of `mine`."""
        order = self._by_owner()
        sent = [sum(self.pieces[i].numel() for i in some) for some in order]
        flat = torch.cat([self.pieces[i].flatten() for some in order for i in some])
        got = [sum(math.prod(self._shape(i, process)) for i in self.mine) for process in range(self.group.size())]
        arrived = flat.new_empty(sum(got))
        dist.all_to_all_single(arrived, flat, got, sent, group=self.group)
        shapes = [self._shape(i, process) for process in range(self.group.size()) for i in self.mine]
        blocks = [b.view(s) for b, s in zip(arrived.split([math.prod(s) for s in shapes]), shapes, strict=True)]
        n = len(self.mine)  # blocks lie process by process
        return [torch.cat(blocks[k::n], self.parts[i].dim) for k, i in enumerate(self.mine)]

    def back(self, wholes: Sequence[Tensor]) -> list[Tensor]:
        """What was made of `mine` -> this process's piece of every matrix of the list."""
        cut = [w.split(list(self.parts[i].sizes), self.parts[i].dim) for w, i in zip(wholes, self.mine, strict=True)]
        blocks = [pieces[process] for process in range(self.group.size()) for pieces in cut]
        empty = self.pieces[0].new_empty(0)
        flat = torch.cat([empty, *(block.flatten() for block in blocks)])
        sent = [sum(pieces[process].numel() for pieces in cut) for process in range(self.group.size())]
        order = self._by_owner()
        got = [sum(self.pieces[i].numel() for i in some) for some in order]
        arrived = flat.new_empty(sum(got))
        dist.all_to_all_single(arrived, flat, got, sent, group=self.group)
        places = [i for some in order for i in some]
        parts = arrived.split([self.pieces[i].numel() for i in places])
        found = {i: part.view_as(self.pieces[i]) for i, part in zip(places, parts, strict=True)}
        return [found[i] for i in range(len(self.pieces))]

    def _by_owner(self) -> list[range]:
        return [range(process, len(self.parts), self.group.size()) for process in range(self.group.size())]

    def _shape(self, i: int, process: int) -> tuple[int, ...]:
        """Of the piece of matrix `i` that a process holds; experts other than this process's don't count."""
        part, shape = self.parts[i], list(self.pieces[i].shape)
        shape[part.dim] = part.sizes[process]
        return tuple(shape)
