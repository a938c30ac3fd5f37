"""The small parts all layers share: RMSNorm, rotary positions with YaRN, and who may see whom.

RoPE (arXiv 2104.09864) rotates pairs of a head's first `dims` numbers by position x theta^(-2i/dims);
YaRN (arXiv 2309.00071) slows the low frequencies down so that a model reaches past its length.

A `Layout` is computed once per forward pass and handed to every layer: positions, rotations and
attention masks. One convention carries everything: a position of 0 starts a new document, -1 is
padding, and in training a fall to p > 0 is a branch that goes on from its document's first p tokens
(packed.py). So packed rows, padded rows and cached rows are the same code.

Shapes, here and everywhere: B batch, T time, D model, H query heads, K key/value heads, C latent,
E experts, F ffn, V vocabulary, P problems, G group, S cache slots, N tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trivet.model import onednn
from trivet.model.native import FEW_ROWS, Kernels, kernels
from trivet.model.packed import WORTH_IT, Apart
from trivet.model.prompt import Prompt
from trivet.spec import Rope, Yarn


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension; centred: the weight is 1 + what is stored.

    What is stored is then near 0, where bf16 is fine, so the sum and the product are made in fp32.
    """

    def __init__(self, dim: int, eps: float, centred: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((dim,), 0.0 if centred else 1.0))
        self.eps, self.centred = eps, centred

    def forward(self, x: Tensor) -> Tensor:
        fast = kernels(x, self.weight)
        if fast is not None:
            return fast.rms_norm(x, self.weight, self.eps, self.centred)
        if self.centred:
            return F.rms_norm(x.float(), self.weight.shape, 1.0 + self.weight.float(), self.eps).to(x.dtype)
        # Under autocast x may be bf16: with a weight of another type there is no fused kernel.
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


Norms = Callable[[int], RMSNorm]  # width -> a norm in the style of the model


ALL = slice(None)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [...,in] -> [...,out] = x weight^T + bias, for a weight [...,in] whose leading dimensions are its rows."""
    fast = few_rows(x, weight)
    if fast is not None:
        return fast.linear(x, weight, bias)
    return onednn.linear(x, weight.flatten(0, -2), bias)


def few_rows(x: Tensor, weight: Tensor) -> Kernels | None:
    """The kernels, where they multiply x [...,in] by this weight faster than a library does."""
    return kernels(x, weight) if x.numel() <= FEW_ROWS * x.shape[-1] and weight.is_contiguous() else None


class Adapter(nn.Module):
    """LoRA's addition to a matrix: x [..., in] -> scale B A x [..., out]. See lora.py, which attaches it."""

    def __init__(self, rank: int, alpha: float, rslora: bool, weight: Tensor) -> None:
        super().__init__()
        d_out, d_in = weight.shape
        self.rank, self.alpha, self.rslora = rank, alpha, rslora
        self.scale = alpha / (math.sqrt(rank) if rslora else rank)
        self.a = nn.Parameter(weight.new_empty(rank, d_in))
        self.b = nn.Parameter(weight.new_zeros(d_out, rank))

    def forward(self, x: Tensor, rows: slice = ALL) -> Tensor:
        return F.linear(F.linear(x, self.a) * self.scale, self.b[rows])

    def delta(self) -> Tensor:
        """[out,in] what it adds to its matrix."""
        return self.scale * self.b @ self.a


class Linear(nn.Linear):
    """nn.Linear without a bias unless asked, plus its adapter if it has one; initialised by the Transformer."""

    def __init__(self, d_in: int, d_out: int, bias: bool = False) -> None:
        super().__init__(d_in, d_out, bias=bias)
        self.lora: Adapter | None = None

    def reset_parameters(self) -> None:
        """Nothing: the Transformer initialises every weight in one function."""

    def forward(self, x: Tensor) -> Tensor:
        y = linear(x, self.weight, self.bias)
        return y if self.lora is None else y + self.lora(x)

    def some(self, x: Tensor, rows: slice) -> Tensor:
        """Some of the numbers [..., rows] that `forward` computes, for those who can't hold all at once."""
        y = linear(x, self.weight[rows], None if self.bias is None else self.bias[rows])
        return y if self.lora is None else y + self.lora(x, rows)

    def matrix(self) -> Tensor:
        """[out,in] the matrix that `forward` applies, for those who multiply by it in another order."""
        return self.weight if self.lora is None else self.weight + self.lora.delta()


class Float32Buffers(nn.Module):
    """A module whose buffers stay fp32 whatever its weights are cast to.

    exp(-slope) near 1 and balancing biases that move by 0.001 do not survive bf16.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Float32Buffers:
        exact = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, moved in self._buffers.items():
            before = exact[name]
            if before is not None and moved is not None and moved.dtype != before.dtype:
                self._buffers[name] = before.to(moved.device)
        return self


def as_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the type that autocast, if it is on, wants for products.

    It does not reach grouped products, products into a given tensor, nor a backward written by hand.
    """
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    return tuple(t.to(torch.get_autocast_dtype(kind)) for t in tensors)


def exact(x: Tensor) -> torch.autocast:
    """Products keep their tensors' own type in here, whatever autocast wants outside."""
    return torch.autocast(x.device.type, enabled=False)


# ---------------------------------------------------------------------------------------- positions
def inverse_frequencies(rope: Rope, device: torch.device | None = None) -> Tensor:
    """[dims/2] angles per position, Llama 3's or YaRN's interpolation included (arXiv 2309.00071, eq. 20-23)."""
    exponent = torch.arange(0, rope.dims, 2, dtype=torch.float32, device=device) / rope.dims
    freq = rope.theta**-exponent
    if rope.llama3 is not None:
        low, high = rope.llama3.low_freq_factor, rope.llama3.high_freq_factor
        turns = freq * rope.llama3.original_length / (2 * math.pi)
        kept = ((turns - low) / (high - low)).clamp(0, 1)  # 0: slow pairs stretch, 1: fast ones stay
        return freq / rope.llama3.factor * (1 - kept) + freq * kept
    if rope.yarn is None:
        return freq
    yarn = rope.yarn

    def turns_at(turns: float) -> float:  # the pair index that makes `turns` rotations in the original length
        return rope.dims * math.log(yarn.original_length / (2 * math.pi * turns)) / (2 * math.log(rope.theta))

    low = max(math.floor(turns_at(yarn.beta_fast)), 0)
    high = min(math.ceil(turns_at(yarn.beta_slow)), rope.dims - 1)
    index = torch.arange(rope.dims // 2, dtype=torch.float32, device=device)
    ramp = ((index - low) / max(high - low, 0.001)).clamp(0, 1)  # 0: fast pairs stay, 1: slow ones stretch
    return freq / yarn.factor * ramp + freq * (1 - ramp)


def yarn_temperature(yarn: Yarn, mscale: float) -> float:
    return 0.1 * mscale * math.log(yarn.factor) + 1.0


def rotation_amplitude(rope: Rope) -> float:
    """The factor on cos and sin: m(mscale) / m(mscale_all_dim), 1 without YaRN."""
    if rope.yarn is None:
        return 1.0
    return yarn_temperature(rope.yarn, rope.yarn.mscale) / yarn_temperature(rope.yarn, rope.yarn.mscale_all_dim)


def apply_rope(x: Tensor, rotation: tuple[Tensor, Tensor], interleaved: bool) -> Tensor:
    """Rotate the first `dims` numbers of x [B,T,heads,hd] by (cos, sin), each [B or 1,T,dims/2]."""
    dims = 2 * rotation[0].shape[-1]
    if dims == 0:
        return x
    fast = kernels(x)
    if fast is not None:
        return fast.rotate(x, *rotation, interleaved)
    if dims < x.shape[-1]:
        return torch.cat((apply_rope(x[..., :dims], rotation, interleaved), x[..., dims:]), -1)
    cos, sin = (part.unsqueeze(2).to(x.dtype) for part in rotation)  # [B,T,1,dims/2]
    if interleaved:
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)  # [B,T,heads,dims/2] each
        return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


# ------------------------------------------------------------------------------------------- layout
Place = Callable[[Tensor], Tensor]  # positions [B,T] -> where to stand instead; hashable, equal if it does the same


@dataclass
class Layout:
    """Where every token of a call stands, shared by all layers.

    positions: [B,T]; 0 starts a document, -1 is padding. None means plain rows 0..T-1 and lets
        attention use its fastest causal path.
    span: with caches, how many slots may be read (largest position + 1). None: the training path.
    given: how the rows are taken apart, where the caller knows.
    """

    positions: Tensor | None
    batch: int
    length: int
    device: torch.device
    span: int | None = None
    prompt: Prompt | None = None  # what is known of all rows at once, so that no mask is needed
    given: Apart | None = None
    _rotations: dict[tuple[Rope, Place | None], tuple[Tensor, Tensor]] = field(default_factory=dict)
    _masks: dict[tuple[int | None, torch.dtype], Tensor | None] = field(default_factory=dict)
    _documents: Tensor | None = None
    _apart: Apart | None = None

    @property
    def cached(self) -> bool:
        return self.span is not None

    def rotation(self, rope: Rope, place: Place | None = None) -> tuple[Tensor, Tensor]:
        """(cos, sin), each [B or 1, T, dims/2], in fp32. `place` moves the tokens first; None: where they stand."""
        if (rope, place) not in self._rotations:
            at = self.at() if place is None else place(self.at())
            angles = at.unsqueeze(-1).float() * inverse_frequencies(rope, self.device)
            amplitude = rotation_amplitude(rope)
            self._rotations[rope, place] = (angles.cos() * amplitude, angles.sin() * amplitude)
        return self._rotations[rope, place]

    def at(self) -> Tensor:
        """[B or 1, T] the position of each token, -1 where there is none."""
        return self.positions if self.positions is not None else torch.arange(self.length, device=self.device)[None]

    def mask(self, window: int | None = None, dtype: torch.dtype = torch.bool) -> Tensor | None:
        """Who sees whom [B,1,T,T] (training) or [B,1,T,S] (cached), as bool or as `added`. None: plain causal."""
        if (window, dtype) not in self._masks:
            seen = self._build_mask(window)
            self._masks[window, dtype] = seen if seen is None or dtype == torch.bool else added(seen, dtype)
        return self._masks[window, dtype]

    def documents(self) -> Tensor:
        """[B,T] document number of each token of the row (a position 0 opens the next one)."""
        if self._documents is None:
            self._documents = (self.at() == 0).cumsum(-1).expand(self.batch, -1)
        return self._documents

    def apart(self) -> Apart | None:
        """How to lay a packed row's documents out one by one, or None where that saves attention no work."""
        apart = self._taken_apart()
        return apart if apart is not None and apart.pairs < WORTH_IT * self.batch * self.length**2 else None

    def along(self, core: Callable[..., Tensor], *parts: Tensor) -> Tensor:
        """core(layout, *parts) of what goes through a row token by token, each [B,T,...], to [B,T,...].

        Where documents branch it goes through each stack of strands instead, for a state has one future only.
        """
        strands = self._taken_apart()
        if strands is None or not strands.branches:
            return core(self, *parts)
        stacks = zip(strands.shapes, *map(strands.split, parts), strict=True)
        return strands.join(
            [core(Layout(None, n, length, self.device), *of) for (n, length), *of in stacks], self.batch
        )

    def _taken_apart(self) -> Apart | None:
        if self.positions is None or self.cached:
            return None
        if self._apart is None:
            if self.given is None and self.device.type != "cpu":
                return None  # to look at the positions would cost a host sync
            self._apart = self.given or Apart.of(self.positions)
        return self._apart

    def _build_mask(self, window: int | None) -> Tensor | None:
        if self.span is not None:
            assert self.positions is not None
            slot = torch.arange(self.span, device=self.device)
            at = self.positions.unsqueeze(-1)  # [B,T,1]; a padding query (-1) sees slot 0, result unused
            seen = slot <= at.clamp_min(0)
            if window is not None:
                seen = seen & (slot > at.clamp_min(0) - window)
            return seen.unsqueeze(1)
        if self.positions is None:
            return None if window is None else causal(self.length, window, self.device)
        return self._in_pieces(window).unsqueeze(1)

    def _in_pieces(self, window: int | None) -> Tensor:
        """[B,T,T]: a token sees what its own piece has up to it, and what of the first piece its branch goes on from."""
        assert self.positions is not None
        at, slot = self.positions, torch.arange(self.length, device=self.device)
        previous = F.pad(at[:, :-1], (1, 0), value=-1)
        begins = (at >= 0) & ((at <= previous) | (previous < 0))
        piece, trunk = (torch.where(first, slot, 0).cummax(-1).values for first in (begins, at == 0))
        start = at.gather(-1, piece)  # [B,T] where the token's piece begins
        i, j = (..., slice(None), None), (..., None, slice(None))
        seen = (piece[i] == piece[j]) & (slot[i] >= slot[j])
        seen |= (trunk[i] == piece[j]) & (at[j] < start[i]) & (at[j] >= 0)
        return seen if window is None else seen & (at[i] - at[j] < window)


def added(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """A bool mask as what is added to scores, 0 or -inf: kernels make it of every mask, and keep it for backward."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, float("-inf"))


def causal(length: int, window: int, device: torch.device) -> Tensor:
    """Who sees whom in one document, bool [1,1,T,T]: a token sees itself and window-1 before it."""
    distance = torch.arange(length, device=device).unsqueeze(-1) - torch.arange(length, device=device)
    return ((distance >= 0) & (distance < window))[None, None]
