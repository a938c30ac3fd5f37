"""A step's loss and its gradient, over however many microbatches and processes it is spread.

    sum over target tokens of -log p  /  target tokens of the whole step
    + mtp_weight x mean over depths of the same loss of the multi-token-prediction modules
    + the sequence-wise balance loss of the routers (mean over rows; a row is a sequence)

One divisor for the whole step, because a mean per microbatch would let a token count more the fewer
tokens stand beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from trivet.model import Routing, Transformer
from trivet.train.data import Batch
from trivet.train.losses import head_loss

Precision = Literal["fp32", "bf16"]


@dataclass
class StepSums:
    """What one step's backward passes add up to."""

    loss: Tensor  # mean over the step's target tokens
    mtp: Tensor
    balance: Tensor
    loads: list[Tensor] = field(default_factory=list)  # [E] tokens a MoE layer


@dataclass(frozen=True)
class Divisors:
    """By what the sums of a step are divided: known before the step, on every process."""

    targets: int
    ahead: list[int]  # targets of each prediction module
    rows: int

    @classmethod
    def of(cls, batches: Sequence[Batch], depths: int) -> Divisors:
        ahead = [sum(int((b.targets_ahead(k) >= 0).sum()) for b in batches) for k in range(1, depths + 1)]
        return cls(sum(b.count for b in batches), ahead, sum(len(b.tokens) for b in batches))


def backward(
    model: Transformer,
    batches: Sequence[Batch],
    mtp_weight: float,
    precision: Precision = "fp32",
    recompute: bool = False,
    divisors: Divisors | None = None,
) -> StepSums:
    """Add the gradient of one step's loss, however its documents are spread over batches and rows.

    divisors: of the whole step, where these batches are a part of it. The sums are then those of the part.
    """
    depths = model.spec.mtp
    of = divisors or Divisors.of(batches, depths)
    zero = torch.zeros((), device=batches[0].tokens.device)
    sums = StepSums(zero, zero, zero)
    products = torch.autocast(zero.device.type, torch.bfloat16, enabled=precision == "bf16")
    for batch in batches:
        routing = Routing()
        with products:
            hidden = model(batch.tokens, batch.positions, routing=routing, recompute=recompute)
            loss = head_loss(hidden.flatten(0, 1), model.head_weight, batch.targets.flatten())[0] / of.targets
            mtp = loss.new_zeros(())
            if depths:
                outputs = model.mtp_hidden(hidden, batch.tokens, batch.positions, routing, recompute)
                for k, (h, n) in enumerate(zip(outputs, of.ahead, strict=True), start=1):
                    targets = batch.targets_ahead(k)
                    mtp = mtp + head_loss(h.flatten(0, 1), model.head_weight, targets.flatten())[0] / max(n, 1) / depths
        balance = torch.as_tensor(routing.balance, device=loss.device) / (of.rows / len(batch.tokens))
        (loss + mtp_weight * mtp + balance).backward()
        sums.loss = sums.loss + loss.detach()
        sums.mtp = sums.mtp + mtp.detach()
        sums.balance = sums.balance + balance.detach()
        old = sums.loads or [torch.zeros_like(load) for load in routing.loads]
        sums.loads = [a + b for a, b in zip(old, routing.loads, strict=True)]
    return sums
