"""Next-token losses whose logits never exist all at once.

With a vocabulary of 152k the logits [N, V] and their gradient are the largest tensors of a training
step by far. Both functions here walk over the tokens in chunks that hold about `CHUNK` numbers, or as
many as W, whose gradient every chunk must read and write:

    loss      sum over tokens of  logsumexp(z) - z[y],   z = W h
    gradient  dz = softmax(z) - onehot(y),   dh = dz W,   dW = dz^T h

`head_loss` makes the gradient while it has the logits (as Liger-Kernel, arXiv 2410.10989), because
its loss is one number. `token_logprobs` gives a value a token, so its backward makes the logits a
second time; with p = softmax(z/T) and entropy H = -sum p log p it is

    d log p[y] / dz = (onehot(y) - p) / T,     dH / dz = -p (log p + H) / T.

Where tokens were drawn from a part S of the vocabulary (top-p and the like), it is given S, and softmax, entropy
and gradient are over S: z = NEVER, so p = 0, elsewhere.

A small vocabulary is one chunk and costs nothing extra. Softmax is in fp32. Left out: z-loss, label
smoothing, second derivatives.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trivet.model.layers import as_autocast
from trivet.model.onednn import times
from trivet.train.data import IGNORE

CHUNK = 2**22  # numbers in one chunk of logits: 16 MB in fp32
NEVER = -1e30  # the logit of what can't be drawn: its p is 0, and so, unlike with -inf, is p log p


@dataclass(frozen=True)
class Sets:
    """What each of N tokens was drawn from: token n from ids[offsets[n] : offsets[n + 1]]."""

    ids: Tensor  # [M]
    offsets: Tensor  # [N+1]

    def to(self, device: torch.device | str) -> Sets:
        return Sets(self.ids.to(device), self.offsets.to(device))

    def outside(self, part: slice, vocab: int) -> Tensor:
        """[n,V] True where a token of `part` could not be drawn."""
        bounds = self.offsets[part.start : part.stop + 1]
        rows = torch.repeat_interleave(bounds.diff())  # [m]
        outside = torch.ones(len(bounds) - 1, vocab, dtype=torch.bool, device=self.ids.device)
        outside[rows, self.ids[bounds[0] : bounds[-1]].long()] = False
        return outside


def head_loss(hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int | None = None) -> tuple[Tensor, int]:
    """Sum of the cross entropies of the tokens that have a target, and how many they are.

    hidden [N, D], weight [V, D], targets [N]; rows with target -100 never reach the matmul.
    """
    keep = (targets != IGNORE).nonzero().squeeze(1)
    if len(keep) < len(targets):
        hidden, targets = hidden[keep], targets[keep]
    hidden, weight = as_autocast(hidden, weight)
    wanted = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return _HeadLoss.apply(hidden, weight, targets, chunk, wanted), len(targets)


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float = 1.0,
    chunk: int | None = None,
    sets: Sets | None = None,
) -> tuple[Tensor, Tensor]:
    """log p(target) and the entropy of each token's distribution at `temperature`: [N], [N] in fp32.

    sets: what the tokens could be drawn from, if not from the whole vocabulary; a target outside of it gets NEVER.
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")
    return _TokenLogprobs.apply(*as_autocast(hidden, weight), targets, temperature, chunk, sets)


def _log_softmax(h: Tensor, weight: Tensor, temperature: float, sets: Sets | None, part: slice) -> Tensor:
    """log p [n,V] of the tokens in `part`, h [n,D]."""
    z = times(h, weight).float().div_(temperature)
    if sets is not None:
        z.masked_fill_(sets.outside(part, len(weight)), NEVER)
    return z.log_softmax(-1)


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int | None, wanted: bool) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        if wanted:
            d_hidden = torch.empty_like(hidden)
            d_weight = torch.zeros_like(weight, dtype=torch.float32)  # bf16 would lose small chunks
        for part in _chunks(len(targets), weight, chunk):
            h, y = hidden[part], targets[part, None]  # [n, D], [n, 1]
            logp = times(h, weight).float().log_softmax(-1)  # [n, V]
            total -= logp.gather(-1, y).sum()
            if wanted:
                dz = logp.exp_()  # p
                dz.scatter_add_(-1, y, dz.new_full((1, 1), -1.0).expand_as(y))
                dz = dz.to(h.dtype)
                d_hidden[part] = times(dz, weight.T)
                d_weight += times(dz.T, h.T)
                del dz
            del logp  # or the next chunk is made beside this one
        if wanted:
            ctx.save_for_backward(d_hidden, d_weight.to(weight.dtype))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        d_hidden, d_weight = ctx.saved_tensors
        return d_hidden * grad, d_weight * grad, None, None, None


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, chunk: int | None,
        sets: Sets | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        logprobs = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        entropy = torch.empty_like(logprobs)
        for part in _chunks(len(targets), weight, chunk):
            logp = _log_softmax(hidden[part], weight, temperature, sets, part)
            logprobs[part] = logp.gather(-1, targets[part, None]).squeeze(-1)
            entropy[part] = -logp.exp().mul_(logp).sum(-1)
            del logp  # or the next chunk is made beside this one
        ctx.save_for_backward(hidden, weight, targets, entropy)
        ctx.temperature, ctx.chunk, ctx.sets = temperature, chunk, sets
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_logprobs: Tensor, d_entropy: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, entropy = ctx.saved_tensors
        d_hidden = torch.empty_like(hidden)
        d_weight = torch.zeros_like(weight, dtype=torch.float32)
        for part in _chunks(len(targets), weight, ctx.chunk):
            h, y = hidden[part], targets[part, None]
            logp = _log_softmax(h, weight, ctx.temperature, ctx.sets, part)
            p = logp.exp()
            a, b, mean = d_logprobs[part, None], d_entropy[part, None], entropy[part, None]
            dz = logp.add_(mean).mul_(b).add_(a).mul_(p).neg_()  # -p (a + b (log p + H)): two chunks live, as above
            del logp, p
            dz = dz.scatter_add_(-1, y, a).div_(ctx.temperature).to(h.dtype)
            d_hidden[part] = times(dz, weight.T)
            d_weight += times(dz.T, h.T)
            del dz
        return d_hidden, d_weight.to(weight.dtype), None, None, None, None


def _chunks(rows: int, weight: Tensor, chunk: int | None) -> Iterator[slice]:
    vocab, d_model = weight.shape
    size = max(d_model, CHUNK // vocab) if chunk is None else chunk
    for start in range(0, rows, size):
        yield slice(start, start + size)
