"""Experts that live on several processes: tokens travel to their experts and back.

    send      (token, expert) pairs sorted by expert, so each process's share lies in one piece
    exchange  counts [processes, experts of each], then rows, by one all-to-all each
    compute   what arrived, by the same grouped products as on one process
    return    the same all-to-all backwards; each token adds up its experts' answers, times their gates

As GShard (arXiv 2006.16668) and Megatron, without capacities: no token is dropped. The gradient of an
exchange is the exchange the other way round, so an expert sees the gradients of all tokens that it served
and its gradient is that of one process.

Left out: overlapping the exchange with the shared expert, limits on how many nodes a token may visit.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trivet.model.ffn import MoEFFN, _Gather, _slots, _Spread, sorted_
from trivet.model.layers import as_autocast


class Experts(nn.Module):
    """This process's experts of one layer, and the group of processes that hold the others in order of rank."""

    def __init__(self, gate_up: nn.Parameter, down: nn.Parameter, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.group = group
        first, here = group.rank() * (len(down) // group.size()), len(down) // group.size()
        self.gate_up, self.down = (
            nn.Parameter(w.detach()[first : first + here].clone(), w.requires_grad) for w in (gate_up, down)
        )

    def forward(self, x: Tensor, chosen: Tensor, gates: Tensor) -> Tensor:
        """x [N,D], chosen and gates [N,k] with ids of all experts -> [N,D]"""
        (x,) = as_autocast(x)
        processes, here, top_k = self.group.size(), len(self.down), chosen.shape[1]
        pair, slot, _ = _slots(chosen.flatten(), processes * here, 1)
        counts = torch.bincount(chosen.flatten(), minlength=processes * here)  # [E]
        theirs = torch.empty_like(counts)  # [processes * here] rows that each process has for each expert here
        dist.all_to_all_single(theirs, counts, group=self.group)
        sent = counts.view(processes, here).sum(1).tolist()
        got = theirs.view(processes, here).sum(1).tolist()
        rows = cast(Tensor, _Spread.apply(x, pair, slot, top_k))  # [N*k,D] expert by expert
        rows = cast(Tensor, _Exchange.apply(rows, sent, got, self.group))  # [S,D] process by process
        expert = torch.arange(here, device=x.device).repeat(processes).repeat_interleave(theirs)  # [S]
        out = sorted_(rows, expert[:, None], rows.new_ones(len(rows), 1), self.gate_up, self.down)
        out = cast(Tensor, _Exchange.apply(out, got, sent, self.group))
        out = cast(Tensor, _Gather.apply(out, pair, slot))  # [N*k,D] token by token again
        return (out.unflatten(0, (-1, top_k)) * gates.unsqueeze(-1)).sum(1)


class _Exchange(torch.autograd.Function):
    """Rows [sum(sent), D] to the processes in order -> [sum(got), D] from them."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: list[int], got: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.sent, ctx.got, ctx.group = sent, got, group
        return _exchange(rows, sent, got, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchange(grads[0], ctx.got, ctx.sent, ctx.group), None, None, None


def _exchange(rows: Tensor, sent: list[int], got: list[int], group: dist.ProcessGroup) -> Tensor:
    out = rows.new_empty(sum(got), rows.shape[1])
    dist.all_to_all_single(out, rows.contiguous(), got, sent, group=group)
    return out


def spread_experts(ffn: MoEFFN, group: dist.ProcessGroup) -> Experts:
    """Leave in `ffn` only this process's share of the experts."""
    ffn.experts = experts = Experts(ffn.gate_up, ffn.down, group)
    del ffn.gate_up, ffn.down
    return experts


def plain_name(name: str) -> str:
    """The name that a parameter has where experts are not spread."""
    return name.replace(".experts.", ".")
