"""What the layers keep of each token: one name, the cache that each layer gets, and its bytes by arithmetic.

    full                      everything, in the model's type
    int8                      everything, in 8 bits
    window:252+4              the last 252 tokens and the first 4                        (StreamingLLM)
    layers:512-128+4          the same with a window a layer: 512 in the first layer, in equal steps to 128 in the last
    snapkv:512/32             512 tokens for each key head: of the older ones those that each block of 32 looked at
    lowrank:1024/256/8192/64  MLA only: the newest 1,024 tokens exactly, 256 numbers of a latent up to an age of 8,192,
                              64 beyond, and the rotated key of all

`layers` and `lowrank` are ideas of our own names: what articles ascribe to DeepSeek-V3 under similar ones is in
neither its paper nor its code. Layers that keep one state a sequence stay as they are, and of a layer with a window of
its own a policy with a bound keeps that window. A bound that no sequence reaches changes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import nn

from trivet.config import UserError
from trivet.model.attention import Attention
from trivet.model.bounded import Ring, Voted
from trivet.model.cache import LayerCache
from trivet.model.compressed import SCALE, Band, Basis, Int8KV, Int8Latent, LowRank
from trivet.model.mla import LatentAttention
from trivet.spec import GQA, MLA, Mixer, ModelSpec

BLOCK = 32  # tokens between two looks at what to keep, where there is no setting for it


@dataclass(frozen=True)
class Place:
    """A layer and the room that it must have: for `rows` sequences of `slots` tokens now, and never more than `longest`."""

    layer: int
    layers: int
    rows: int
    slots: int
    longest: int
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class Full:
    """Everything; the policies below say what is different with them."""

    resumes: ClassVar[bool] = True  # whether a prefix store can keep and give back what a row remembers
    block: ClassVar[int] = 0  # positions that no call may cross a multiple of; 0: it may
    name: ClassVar[str] = "full"

    def new_cache(self, mixer: nn.Module, at: Place) -> LayerCache:
        """An empty cache. Raises UserError where a layer can't be kept so."""
        cache: LayerCache = mixer.new_cache(at.rows, at.slots, at.dtype, at.device)  # type: ignore[operator]
        return cache

    def layer_bytes(self, mixer: Mixer, layer: int, layers: int, tokens: int, itemsize: int) -> int:
        """Of one sequence in one layer, without the spare slot."""
        return mixer.cache_per_token() * itemsize * tokens + mixer.state() * 4

    def row_bytes(self, spec: ModelSpec, tokens: int, itemsize: int) -> int:
        """Of one sequence of that many tokens in all layers; weights' or activations' bytes are not in it."""
        found = [layer.mixer for layer in spec.layers]
        return sum(self.layer_bytes(mixer, i, len(found), tokens, itemsize) for i, mixer in enumerate(found))

    def check(self, spec: ModelSpec) -> None:
        """Raises UserError where it can't be applied to such a model."""


@dataclass(frozen=True)
class Int8(Full):
    name: ClassVar[str] = "int8"

    def new_cache(self, mixer: nn.Module, at: Place) -> LayerCache:
        if isinstance(mixer, Attention):
            return Int8KV(mixer.spec, at.rows, at.slots, at.dtype, at.device)
        if isinstance(mixer, LatentAttention):
            return Int8Latent(mixer.spec, at.rows, at.slots, at.dtype, at.device)
        return super().new_cache(mixer, at)

    def layer_bytes(self, mixer: Mixer, layer: int, layers: int, tokens: int, itemsize: int) -> int:
        scales = {"gqa": lambda: 2 * mixer.kv_heads, "mla": lambda: 2}.get(mixer.kind, lambda: 0)()  # type: ignore[union-attr]
        return (mixer.cache_per_token() + scales * SCALE.itemsize) * tokens + mixer.state() * 4


@dataclass(frozen=True)
class Bounded(Full):
    """A number of slots a layer, whatever the length."""

    def check(self, spec: ModelSpec) -> None:
        for i, layer in enumerate(spec.layers):
            if isinstance(layer.mixer, GQA) and layer.mixer.chunks is not None:
                raise UserError(
                    f"Cache {self.name}: layer {i} counts positions by chunks and needs every token; use full or int8."
                )

    def bound(self, layer: int, layers: int) -> tuple[int, int]:
        """Window and sinks of a layer."""
        raise NotImplementedError

    def room(self, mixer: Mixer, layer: int, layers: int, longest: int) -> tuple[int, int]:
        """The same where no sequence is longer than `longest`, and the layer may have a window of its own."""
        window, sinks = self.bound(layer, layers)
        if isinstance(mixer, GQA) and mixer.window is not None:
            window, sinks = min(window + sinks, mixer.window), 0
        sinks = min(sinks, longest - 1)
        return min(window, longest - sinks), sinks

    def new_cache(self, mixer: nn.Module, at: Place) -> LayerCache:
        heads, widths = _stored(mixer)
        if not widths:
            return super().new_cache(mixer, at)
        window, sinks = self.room(mixer.spec, at.layer, at.layers, at.longest)  # type: ignore[arg-type]
        return Ring(heads, widths, at.rows, window, sinks, (at.dtype, at.device))

    def layer_bytes(self, mixer: Mixer, layer: int, layers: int, tokens: int, itemsize: int) -> int:
        return super().layer_bytes(mixer, layer, layers, sum(self.room(mixer, layer, layers, tokens)), itemsize)


@dataclass(frozen=True)
class Window(Bounded):
    window: int
    sinks: int = 4
    name: ClassVar[str] = "window"

    def bound(self, layer: int, layers: int) -> tuple[int, int]:
        return self.window, self.sinks


@dataclass(frozen=True)
class Layers(Bounded):
    first: int
    last: int
    sinks: int = 4
    name: ClassVar[str] = "layers"

    def bound(self, layer: int, layers: int) -> tuple[int, int]:
        return self.first + (self.last - self.first) * layer // max(layers - 1, 1), self.sinks


@dataclass(frozen=True)
class SnapKV(Bounded):
    budget: int
    every: int = BLOCK
    name: ClassVar[str] = "snapkv"

    def __post_init__(self) -> None:
        if self.budget < 2 * self.every:
            raise UserError(
                f"Cache snapkv:{self.budget}/{self.every}: keep at least two blocks of {self.every} tokens, "
                f"{2 * self.every}, or look more often."
            )

    @property
    def block(self) -> int:  # type: ignore[override]
        return self.every

    def bound(self, layer: int, layers: int) -> tuple[int, int]:
        return self.budget, 0

    def slots(self, longest: int) -> int:
        return min(self.budget, (-(-longest // self.every) + 1) * self.every)

    def new_cache(self, mixer: nn.Module, at: Place) -> LayerCache:
        heads, widths = _stored(mixer)
        if not widths or (isinstance(mixer, Attention) and mixer.spec.window is not None):
            return super().new_cache(mixer, at)
        return Voted(heads, widths, at.rows, self.slots(at.longest), self.every, (at.dtype, at.device))

    def layer_bytes(self, mixer: Mixer, layer: int, layers: int, tokens: int, itemsize: int) -> int:
        heads = 1 if isinstance(mixer, MLA) else mixer.kv_heads if isinstance(mixer, GQA) and not mixer.window else 0
        if heads:
            return self.slots(tokens) * (mixer.cache_per_token() * itemsize + 4 * heads)  # a vote is fp32
        return super().layer_bytes(mixer, layer, layers, tokens, itemsize)


@dataclass(frozen=True)
class RankByAge(Full):
    """steps: ((age, rank), ...): tokens older than `age` keep `rank` numbers of their latent. bases: one a layer,
    None where it has no latent; `calibrate` finds them."""

    steps: tuple[tuple[int, int], ...]
    bases: tuple[Basis | None, ...] | None = None
    resumes: ClassVar[bool] = False
    block: ClassVar[int] = BLOCK
    name: ClassVar[str] = "lowrank"

    def __post_init__(self) -> None:
        ages, ranks = zip(*self.steps, strict=True)
        if list(ages) != sorted(set(ages)) or list(ranks) != sorted(set(ranks), reverse=True) or min(ranks) < 1:
            raise UserError(f"Cache lowrank: ages must grow and ranks shrink, at least to 1; got {self.steps}.")

    def with_bases(self, bases: Sequence[Basis | None]) -> RankByAge:
        return replace(self, bases=tuple(bases))

    def check(self, spec: ModelSpec) -> None:
        self.fits(spec)
        if self.bases is None:
            raise UserError("Cache lowrank needs a basis a layer: engine.calibrate finds them on texts of your kind.")

    def fits(self, spec: ModelSpec) -> None:
        """Raises UserError where the model's latents can't be shortened so, whatever the bases."""
        ranks = [layer.mixer.kv_rank for layer in spec.layers if isinstance(layer.mixer, MLA)]
        if not ranks:
            raise UserError(
                "Cache lowrank shortens MLA's latents, and this model has no MLA layer; use int8 or snapkv."
            )
        if self.steps[0][1] >= min(ranks):
            raise UserError(f"Cache lowrank: a rank of {self.steps[0][1]} shortens no latent of {min(ranks)} numbers.")

    def bands(self, kv_rank: int, longest: int) -> list[Band]:
        """What tokens lose as they age, the last coordinates first."""
        stops = [kv_rank, *(rank for _, rank in self.steps)]
        return [
            Band(rank, stop, age, min(age + self.block, longest))
            for (age, rank), stop in zip(self.steps, stops, strict=False)
        ]

    def new_cache(self, mixer: nn.Module, at: Place) -> LayerCache:
        if not isinstance(mixer, LatentAttention):
            return super().new_cache(mixer, at)
        assert self.bases is not None
        basis, bands = self.bases[at.layer], self.bands(mixer.spec.kv_rank, at.longest)
        assert basis is not None
        rank, like = self.steps[-1][1], (at.dtype, at.device)
        return LowRank(mixer.spec, basis, rank, bands, self.block, at.rows, at.slots, like)

    def layer_bytes(self, mixer: Mixer, layer: int, layers: int, tokens: int, itemsize: int) -> int:
        if not isinstance(mixer, MLA):
            return super().layer_bytes(mixer, layer, layers, tokens, itemsize)
        bands = sum((b.stop - b.start) * b.slots for b in self.bands(mixer.kv_rank, tokens))
        return ((self.steps[-1][1] + mixer.rope.dims) * tokens + bands) * itemsize


Policy = Full | Int8 | Window | Layers | SnapKV | RankByAge

FORMS = "full, int8, window:252+4, layers:512-128+4, snapkv:512/32, lowrank:1024/64"


def parse_policy(text: str) -> Policy:
    """A policy by its name and numbers, as in the table above. Raises UserError for what is none."""
    kind, _, rest = text.partition(":")
    numbers = [int(n) for n in re.split(r"[-+/]", rest)] if re.fullmatch(r"\d+([-+/]\d+)*", rest) else []
    shapes = {
        "full": (r"", Full), "int8": (r"", Int8), "window": (r"N(\+N)?", Window), "layers": (r"N-N(\+N)?", Layers),
        "snapkv": (r"N(/N)?", SnapKV), "lowrank": (r"N/N(/N/N)*", None),
    }  # fmt: skip
    if kind not in shapes or not re.fullmatch(shapes[kind][0].replace("N", r"\d+"), rest):
        raise UserError(f"--cache {text!r} is no cache policy; write for example {FORMS}.")
    if kind != "lowrank" and 0 in numbers[: 2 if kind in ("layers", "snapkv") else 1]:
        raise UserError(f"--cache {text!r} keeps nothing: its numbers of tokens must be 1 or more.")
    if kind == "lowrank":
        return RankByAge(tuple(zip(numbers[::2], numbers[1::2], strict=True)))
    make = shapes[kind][1]
    assert make is not None
    return make(*numbers)


def _stored(mixer: nn.Module) -> tuple[int, tuple[int, ...]]:
    """Heads, and the widths of what is kept of each token; no widths: one state a sequence."""
    if isinstance(mixer, Attention):
        return mixer.spec.kv_heads, (mixer.spec.head_dim, mixer.spec.head_dim)
    if isinstance(mixer, LatentAttention):
        return 1, (mixer.spec.cache_per_token(),)
    return 0, ()
