"""Logits to tokens, every row with its own settings.

Randomness is a counter: token i of a request with seed s uses the uniform number u(s, i), made by
hashing (splitmix64), and takes the token whose cumulative probability first exceeds u. So what a
request draws depends on nothing around it: not on the batch, not on when it was paused.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 64  # of a vocabulary: sums of such blocks are cheap


@dataclass
class Settings:
    """Sampling settings of the rows of a batch, [B] each, on the device of the logits."""

    temperature: Tensor
    top_p: Tensor
    top_k: Tensor
    min_p: Tensor
    seed: Tensor

    def __getitem__(self, rows: Tensor) -> Settings:
        return Settings(*(t[rows] for t in (self.temperature, self.top_p, self.top_k, self.min_p, self.seed)))


def sample(
    logits: Tensor, settings: Settings, index: Tensor, steered: Tensor | None = None, sets: list[Tensor] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """logits [B,V], index [B] (of the token in its request) -> tokens, logprobs, raw logprobs, [B] each.

    steered: the logits [B,V] to draw from, where penalties, biases or grammars changed them. logprobs are under the
    distribution that was drawn from (0 for a greedy row, which had no choice), raw ones under the model's own
    (temperature 1, nothing cut off). sets: takes which tokens could be drawn, [B,V] bool, if any row leaves some out.
    """
    raw = logits.float().log_softmax(-1)  # [B,V]
    greedy = settings.temperature == 0
    start = raw if steered is None else steered.float().log_softmax(-1)
    cut = (settings.top_p < 1) | (settings.top_k > 0) | (settings.min_p > 0)
    if bool((settings.temperature != 1).any()) or bool(cut.any()):
        scaled = start / torch.where(greedy, 1.0, settings.temperature).unsqueeze(-1)
        if bool(cut.any()):
            rows = cut.nonzero().squeeze(-1)
            scaled[rows] = truncate(scaled[rows], settings[rows])
            if sets is not None:
                sets.append(scaled > float("-inf"))
        logp = scaled.log_softmax(-1)
    else:
        logp = start
    tokens = draw(logp.exp(), uniform(settings.seed, index))
    if bool(greedy.any()):
        tokens = torch.where(greedy, start.argmax(-1), tokens)
    chosen = tokens.unsqueeze(-1)
    logprobs = torch.where(greedy, 0.0, logp.gather(-1, chosen).squeeze(-1))
    return tokens, logprobs, raw.gather(-1, chosen).squeeze(-1)


def draw(p: Tensor, u: Tensor) -> Tensor:
    """p [B,V] >= 0, u [B] in [0, 1) -> [B] the first token at which the running sum of p exceeds u times all of it.

    By block first, then inside one: a running sum of the whole row in float64 takes longer than the rest of a step.
    """
    short = -p.shape[-1] % BLOCK
    blocks = (F.pad(p, (0, short)) if short else p).unflatten(-1, (-1, BLOCK))  # [B,V/BLOCK,BLOCK]
    ends = blocks.sum(-1).double().cumsum(-1)
    target = u.unsqueeze(-1) * ends[:, -1:]
    block = torch.searchsorted(ends, target, right=True).clamp_max(ends.shape[-1] - 1)  # [B,1]
    inside = blocks[torch.arange(len(p), device=p.device), block.squeeze(-1)].double().cumsum(-1)  # [B,BLOCK]
    # The two sums of a block may differ in their last digits; what has no probability is not drawn for that.
    target = target - ends.gather(-1, block) + inside[:, -1:]
    target = torch.minimum(target.clamp_min(0), inside[:, -1:] * (1 - 1e-12))
    return (block * BLOCK + torch.searchsorted(inside, target, right=True)).squeeze(-1)


def truncate(logits: Tensor, settings: Settings) -> Tensor:
    """Drop what top-k, top-p (smallest set that reaches p) and min-p leave out: -inf. The best stays."""
    ordered, order = logits.sort(-1, descending=True)
    p = ordered.softmax(-1)
    rank = torch.arange(logits.shape[-1], device=logits.device)
    top_k = torch.where(settings.top_k > 0, settings.top_k, logits.shape[-1]).unsqueeze(-1)
    keep = rank < top_k
    p = p * keep / (p * keep).sum(-1, keepdim=True)  # top-p counts what top-k left, as vLLM and HF do
    keep = keep & (p.cumsum(-1) - p < settings.top_p.unsqueeze(-1))
    keep = keep & (p >= settings.min_p.unsqueeze(-1) * p[:, :1])
    keep[:, 0] = True
    return torch.empty_like(logits).scatter_(-1, order, ordered.masked_fill(~keep, float("-inf")))


def uniform(seed: Tensor, index: Tensor) -> Tensor:
    """[B] numbers in [0, 1), in float64, a hash of (seed, index)."""
    state = _mix(seed.long()) + (index.long() + 1) * -7046029254386353131  # the golden ratio, 2^64 / phi
    return _shift(_mix(state), 11).double() * 2.0**-53


def _mix(z: Tensor) -> Tensor:
    """splitmix64's finaliser (Steele et al. 2014) in wrapping int64."""
    z = (z ^ _shift(z, 30)) * -4658895280553007687
    z = (z ^ _shift(z, 27)) * -7723592293110705685
    return z ^ _shift(z, 31)


def _shift(z: Tensor, bits: int) -> Tensor:
    return (z >> bits) & ((1 << (64 - bits)) - 1)  # logical, where >> on int64 is arithmetic
