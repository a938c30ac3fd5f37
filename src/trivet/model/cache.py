"""What one layer remembers of each sequence, by kind of mixer.

    KVCache      keys and values          2 x kv_heads x head_dim numbers a token
    LatentCache  MLA's latent + RoPE key  kv_rank + rope dims numbers a token
    StateCache   a recurrent state        heads x head_dim^2 numbers a sequence, fp32
    DeltaCache   a state, last inputs     heads x key_dim x value_dim + 3 x conv width, fp32

A token at position p of row b lives in slot p of row b. There is no length counter: the engine owns
positions, a layer only writes where it is told. Position -1 means "nothing here": it indexes the
last slot, one spare slot that is never read, so padding needs no branch and no host sync.

Caches that keep less stand behind the same interface: `compressed.py` (8 bits, a latent of few numbers) and
`bounded.py` (fewer tokens). Left out: paging.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from trivet.model.native import kernels
from trivet.spec import GQA, MLA, GatedDeltaNet, Lightning


class LayerCache(Protocol):
    """`rows` sequences, each remembered on its own."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The storage, rows first."""
        ...

    def copy_rows(self, src: Tensor, dst: Tensor, source: LayerCache | None = None) -> None:
        """Row dst[i] becomes a copy of row src[i] (of `source`, or of this cache): a fork."""
        ...

    def keep_rows(self, index: Tensor) -> None:
        """Keep only these rows, in this order, and give the memory of the others back."""
        ...

    def copy_from(self, source: LayerCache, rows: int) -> None:
        """Take over the first rows of a cache with fewer rows or slots."""
        ...

    def copy(self) -> LayerCache: ...

    def view(self, rows: slice) -> LayerCache:
        """These rows as a cache of its own over the same memory."""
        ...

    @property
    def slot_dim(self) -> int | None:
        """The dimension of the slots in every tensor; None where a sequence has one state, whatever its length."""
        ...

    @property
    def nbytes(self) -> int: ...


class RowStore:
    """Row handling for any storage of shape [rows, ...]."""

    tensors: tuple[Tensor, ...]
    slot_dim: int | None = None

    def copy_rows(self, src: Tensor, dst: Tensor, source: LayerCache | None = None) -> None:
        origin = self.tensors if source is None else source.tensors
        for mine, theirs in zip(self.tensors, origin, strict=True):
            mine[dst] = theirs[src]

    def keep_rows(self, index: Tensor) -> None:
        self.tensors = tuple(t[index] for t in self.tensors)

    def copy_from(self, source: LayerCache, rows: int) -> None:
        for mine, theirs in zip(self.tensors, source.tensors, strict=True):
            if self.slot_dim is None:
                mine[:rows] = theirs[:rows]
            else:  # the spare slot stays where it is
                slots = theirs.shape[self.slot_dim] - 1
                mine.narrow(self.slot_dim, 0, slots)[:rows] = theirs.narrow(self.slot_dim, 0, slots)[:rows]

    def copy(self) -> LayerCache:
        twin = copy.copy(self)
        twin.tensors = tuple(t.clone() for t in self.tensors)
        return twin

    def view(self, rows: slice) -> LayerCache:
        part = copy.copy(self)
        part.tensors = tuple(t[rows] for t in self.tensors)
        return part

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors)


class KVCache(RowStore):
    """Keys and values, each [rows, K, slots+1, head_dim]: a head's slots lie together for decode."""

    slot_dim = 2

    def __init__(self, spec: GQA, rows: int, slots: int, dtype: torch.dtype, device: torch.device) -> None:
        shape = (rows, spec.kv_heads, slots + 1, spec.head_dim)
        self.tensors = tuple(torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))

    def update(self, new: Sequence[Tensor], positions: Tensor, span: int) -> tuple[Tensor, ...]:
        """Write k, v [B,T,K,hd] at positions [B,T]; return what may be read, [B,K,span,hd] each."""
        fast = kernels(*new, *self.tensors)
        if fast is not None:
            for store, x in zip(self.tensors, new, strict=True):
                fast.remember(store.transpose(1, 2), x, positions)
            return self._read(len(positions), span)
        rows = torch.arange(len(positions), device=positions.device).unsqueeze(-1)
        for store, x in zip(self.tensors, new, strict=True):
            store[rows, :, positions] = x.to(store.dtype)
        return self._read(len(positions), span)

    def _read(self, rows: int, span: int) -> tuple[Tensor, ...]:
        return tuple(store[:rows, :, :span] for store in self.tensors)


class LatentCache(RowStore):
    """MLA's normed latent and rotated shared key, side by side: [rows, slots+1, C + rope dims]."""

    slot_dim: int | None = 1

    def __init__(self, spec: MLA, rows: int, slots: int, dtype: torch.dtype, device: torch.device) -> None:
        self.tensors = (torch.zeros(rows, slots + 1, spec.cache_per_token(), dtype=dtype, device=device),)

    def update(self, latent: Tensor, positions: Tensor, span: int) -> Tensor:
        """Write latent [B,T,C+R] at positions [B,T]; return what may be read, [B,span,C+R]."""
        (store,) = self.tensors
        fast = kernels(latent, store)
        if fast is not None:
            fast.remember(store.unsqueeze(2), latent.unsqueeze(2), positions)
        else:
            rows = torch.arange(len(positions), device=positions.device).unsqueeze(-1)
            store[rows, positions] = latent.to(store.dtype)
        return store[: len(positions), :span]


class StateCache(RowStore):
    """A linear-attention state per head, [rows, H, head_dim, head_dim], always fp32."""

    def __init__(self, spec: Lightning, rows: int, slots: int, dtype: torch.dtype, device: torch.device) -> None:
        shape = (rows, spec.heads, spec.head_dim, spec.head_dim)
        self.tensors = (torch.zeros(shape, dtype=torch.float32, device=device),)

    def read(self, batch: int) -> Tensor:
        return self.tensors[0][:batch]

    def write(self, state: Tensor) -> None:
        self.tensors[0][: len(state)] = state


class DeltaCache(RowStore):
    """A delta-rule state per head [rows,H,dk,dv] and the convolution's last inputs [rows,conv-1,W], always fp32."""

    def __init__(self, spec: GatedDeltaNet, rows: int, slots: int, dtype: torch.dtype, device: torch.device) -> None:
        shapes = (rows, spec.heads, spec.key_dim, spec.value_dim), (rows, spec.conv - 1, spec.conv_width)
        self.tensors = tuple(torch.zeros(shape, dtype=torch.float32, device=device) for shape in shapes)

    def read(self, batch: int) -> tuple[Tensor, Tensor]:
        state, inputs = self.tensors
        return state[:batch], inputs[:batch]

    def write(self, state: Tensor, inputs: Tensor) -> None:
        for mine, new in zip(self.tensors, (state, inputs), strict=True):
            mine[: len(new)] = new
