"""Feed-forward layers: SwiGLU, and DeepSeekMoE with its router.

MoE (arXiv 2401.06066; DeepSeek-V3, 2412.19437, eq. 12-20), for each token x:

    s = sigmoid(W_g x) or softmax(W_g x)          affinities, in fp32
    chosen = top-k of (s + b), inside the best groups        b balances the load, for selection only
    g_i = s_i / sum(chosen s) x scale
    y = shared(x) + sum over chosen of g_i expert_i(x)

    b_i <- b_i + gamma sign(mean load - load_i)   after each optimizer step (auxiliary-loss-free)
    L_bal = alpha sum_i f_i P_i                   per sequence; optional

Every token reaches its experts. Two forms of the expert sum stand behind one signature: `sorted_`
groups tokens by expert and runs one grouped matrix product per weight (work proportional to top_k);
`fused` runs all experts as one dense product and multiplies by the mostly zero gates (work
proportional to all experts, but two large products: faster for few tokens and small experts).
`pick_form` states the rule; benchmarks/moe_forms.py measured it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trivet.config import UserError
from trivet.model import onednn
from trivet.model.layers import Float32Buffers, Layout, as_autocast, exact, few_rows, linear
from trivet.model.native import FEW_CHOICES, FEW_ROWS, kernels
from trivet.spec import MoE, SwiGLU


@dataclass
class Routing:
    """What the routers chose in one forward pass; with `replay`, what they must choose.

    replay: as `experts`; -1 where nothing is known and the router chooses.
    own: with `replay`, what the routers would have chosen everywhere.
    experts: one [B,T,k] tensor of expert ids a MoE layer, in depth order.
    loads: one [E] count of tokens a MoE layer, padding not counted.
    balance: sum of the sequence-wise balance losses (already times alpha), with gradient.
    """

    replay: list[Tensor] | None = None
    own: list[Tensor] = field(default_factory=list)
    experts: list[Tensor] = field(default_factory=list)
    loads: list[Tensor] = field(default_factory=list)
    balance: Tensor | float = 0.0

    def next_replay(self, ffn: nn.Module) -> list[Tensor] | None:
        """What the next layer must choose, if it is one that chooses."""
        if self.replay is None or not isinstance(ffn, MoEFFN):
            return None
        return [self.replay[len(self.experts)]]

    def take(self, notes: Routing) -> None:
        """Add what one layer noted apart."""
        self.own += notes.own
        self.experts += notes.experts
        self.loads += notes.loads
        self.balance = self.balance + notes.balance


class DenseFFN(nn.Module):
    """down(silu(gate x) * up x); gate and up lie in one weight [2,F,D] so they are one product."""

    def __init__(self, hidden: int, d_model: int) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(2, hidden, d_model))
        self.down = nn.Parameter(torch.empty(d_model, hidden))
        self.lora = nn.ModuleDict()  # adapters of "gate", "up" and "down", if there are any (lora.py)

    @classmethod
    def from_spec(cls, spec: SwiGLU, d_model: int) -> DenseFFN:
        return cls(spec.hidden, d_model)

    def forward(self, x: Tensor, layout: Layout | None = None, routing: Routing | None = None) -> Tensor:
        fast = few_rows(x, self.gate_up) if not self.lora else None
        if fast is not None:
            return fast.swiglu(x, self.gate_up, self.down)
        both = linear(x, self.gate_up)  # [...,2F]
        fast = kernels(both) if not self.lora else None
        if fast is not None:
            return linear(fast.silu_mul(both), self.down)
        gate, up = both.chunk(2, -1)
        h = F.silu(self._adapted(gate, "gate", x)) * self._adapted(up, "up", x)
        return self._adapted(linear(h, self.down), "down", h)

    def _adapted(self, y: Tensor, part: str, x: Tensor) -> Tensor:
        return y + self.lora[part](x) if part in self.lora else y


class MoEFFN(Float32Buffers):
    bias: Tensor

    def __init__(self, spec: MoE, d_model: int) -> None:
        super().__init__()
        if spec.hidden % 8 or d_model % 8:
            raise UserError(
                f"moe: hidden ({spec.hidden}) and d_model ({d_model}) must be multiples of 8, "
                "because grouped matrix products need rows of whole 16 bytes."
            )
        self.spec = spec
        self.router = nn.Parameter(torch.empty(spec.experts, d_model))
        if spec.selection_bias:
            self.register_buffer("bias", torch.zeros(spec.experts))
        self.gate_up = nn.Parameter(torch.empty(spec.experts, 2, spec.hidden, d_model))
        self.down = nn.Parameter(torch.empty(spec.experts, spec.hidden, d_model))  # input-major: [E,F,D]
        self.shared = DenseFFN(spec.shared_hidden, d_model) if spec.shared_hidden else None
        self.shared_gate = nn.Parameter(torch.empty(1, d_model)) if spec.shared_gate else None
        self.experts: nn.Module | None = (
            None  # in place of gate_up and down: shared by processes (experts.py), in few bits (quant.py)
        )

    @classmethod
    def from_spec(cls, spec: MoE, d_model: int) -> MoEFFN:
        return cls(spec, d_model)

    def forward(self, x: Tensor, layout: Layout | None = None, routing: Routing | None = None) -> Tensor:
        """x [B,T,D] -> [B,T,D]."""
        flat = x.flatten(0, 1)  # [N,D]
        scores, chosen, gates = self._route(flat, routing)
        if routing is not None:
            self._record(routing, scores, chosen, x.shape, layout)
        y = self._experts(flat, chosen, gates)
        if self.shared is not None:
            always = self.shared(flat)
            if self.shared_gate is not None:
                always = F.linear(flat, self.shared_gate).sigmoid() * always
            y = y + always
        return y.view_as(x)

    def _route(self, flat: Tensor, routing: Routing | None) -> tuple[Tensor, Tensor, Tensor]:
        """[N,D] -> scores [N,E], chosen experts [N,k], their gates [N,k]."""
        s, replay = self.spec, routing.replay if routing is not None else None
        fast = kernels(flat, self.router)
        if fast is not None and replay is None and s.groups == 1 and len(flat) <= FEW_ROWS:
            bias = self.bias if s.selection_bias else None
            return fast.route(flat, self.router, bias, s.top_k, s.score == "softmax", s.norm_topk, s.scale)
        scores = self._scores(flat)
        chosen = self._choose(scores.detach())
        if routing is not None and replay is not None:
            given = replay[len(routing.experts)]
            routing.own.append(chosen.view(given.shape))
            chosen = torch.where(given.flatten(0, 1) < 0, chosen, given.flatten(0, 1))
        gates = scores.gather(1, chosen)
        if s.norm_topk:
            gates = gates / (gates.sum(-1, keepdim=True) + 1e-20)
        return scores, chosen, (gates * s.scale).to(flat.dtype)

    def _experts(self, flat: Tensor, chosen: Tensor, gates: Tensor) -> Tensor:
        if self.experts is not None:
            out: Tensor = self.experts(flat, chosen, gates)
            return out
        return self._form(flat)(flat, chosen, gates, self.gate_up, self.down)

    def _form(self, flat: Tensor) -> Form:
        fast = kernels(flat, self.gate_up, self.down)
        whole = self.gate_up.is_contiguous() and self.down.is_contiguous()
        if fast is not None and whole and len(flat) * self.spec.top_k <= FEW_CHOICES * self.spec.experts:
            return fast.experts
        return pick_form(self.spec, flat.shape[-1], len(flat), flat.element_size(), flat.device.type)

    def _scores(self, x: Tensor) -> Tensor:
        with exact(x):
            logits = F.linear(x.float(), self.router.float())
        return logits.sigmoid() if self.spec.score == "sigmoid" else logits.softmax(-1)

    def _choose(self, scores: Tensor) -> Tensor:
        """[N,E] affinities -> [N,k] expert ids: bias, then group limit, then top-k."""
        s = self.spec
        ranked = scores + self.bias if s.selection_bias else scores
        if s.groups > 1:
            grouped = ranked.unflatten(-1, (s.groups, -1))  # [N,groups,E/groups]
            best = grouped.amax(-1) if s.group_score == "max" else grouped.topk(2, -1).values.sum(-1)
            kept = torch.zeros_like(best, dtype=torch.bool).scatter_(1, best.topk(s.top_groups, -1).indices, True)
            ranked = grouped.masked_fill(~kept.unsqueeze(-1), float("-inf")).flatten(1)
        return ranked.topk(s.top_k, -1).indices

    def _record(
        self, routing: Routing, scores: Tensor, chosen: Tensor, shape: torch.Size, layout: Layout | None
    ) -> None:
        s, (batch, length) = self.spec, shape[:2]
        real = scores.new_ones(batch, length)
        if layout is not None and layout.positions is not None:
            real = (layout.positions >= 0).to(scores.dtype).expand(batch, length)
        hits = torch.zeros_like(scores).scatter_(1, chosen, 1.0).view(batch, length, -1) * real.unsqueeze(-1)
        routing.experts.append(chosen.view(batch, length, -1))
        routing.loads.append(hits.sum((0, 1)))
        if s.balance > 0:
            count = real.sum(-1, keepdim=True).clamp_min(1)  # [B,1] tokens of each sequence
            share = scores / scores.sum(-1, keepdim=True)
            f = hits.sum(1) * s.experts / (s.top_k * count)  # [B,E]
            p = (share.view(batch, length, -1) * real.unsqueeze(-1)).sum(1) / count
            routing.balance = routing.balance + s.balance * (f * p).sum(-1).mean()

    def update_bias(self, load: Tensor) -> None:
        """The auxiliary-loss-free rule: raise the bias of under-loaded experts, lower the others.

        A frozen router keeps its bias: an adapter must fit the model that it was trained on.
        """
        if self.spec.selection_bias and self.router.requires_grad:
            self.bias += self.spec.bias_rate * (load.mean() - load).sign()


# ------------------------------------------------------------------------- the sum over chosen experts
Form = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
# How many needless numbers of expert weight `fused` may touch for each expert's products that it saves, by
# device and bytes a number: on a CPU a bf16 product of few rows has a far higher fixed cost; on a GPU the
# fixed costs are launches, and in fp32 a grouped product is a loop. From benchmarks/moe_forms.py.
NEEDLESS = {("cpu", 4): 2**15, ("cpu", 2): 2**19, ("cuda", 4): 2**25, ("cuda", 2): 2**25}


def pick_form(spec: MoE, d_model: int, tokens: int, bytes_per_number: int, device: str = "cpu") -> Form:
    """`fused` where its needless work costs less than the calls it saves, else `sorted_`.

    Needless are the experts that no token chose, read once, and the products of tokens with experts
    they did not choose, which cost about an eighth of reading them.
    """
    met = spec.experts * (1 - (1 - spec.top_k / spec.experts) ** tokens)  # expected, if all are alike
    needless = (spec.experts - met) + tokens * (spec.experts - spec.top_k) / 8
    allowed = met * NEEDLESS.get((device, bytes_per_number), 0)
    return fused if needless * spec.hidden * d_model <= allowed else sorted_


def fused(x: Tensor, chosen: Tensor, gates: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """All experts for all tokens, weighted by gates that are mostly zero. x [N,D] -> [N,D]"""
    experts, _, hidden, _ = gate_up.shape
    weights = torch.zeros(len(x), experts, dtype=x.dtype, device=x.device).scatter(1, chosen, gates)  # [N,E]
    h = F.linear(x, gate_up.flatten(0, 2)).unflatten(-1, (experts, 2, hidden))  # [N,E,2,F]
    h = F.silu(h[:, :, 0]) * h[:, :, 1] * weights.unsqueeze(-1)  # [N,E,F]
    return h.flatten(1) @ down.flatten(0, 1)


# On a CPU a product of a new shape by oneDNN (bf16; fp32 where onednn.py says so) first compiles its kernel, which takes
# longer than running it, and groups change size at every step: so they are filled up to a multiple, by device and
# bytes a number.
FILLED = 16
GROUP_MULTIPLE = {("cpu", 2): FILLED}


def sorted_(x: Tensor, chosen: Tensor, gates: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Sort (token, expert) pairs by expert and run grouped matrix products. x [N,D] -> [N,D]"""
    x, gate_up, down = as_autocast(x, gate_up, down)
    top_k = chosen.shape[1]
    multiple = GROUP_MULTIPLE.get((x.device.type, x.element_size()), 1)
    if onednn.applies_in_inference(x, len(x) * top_k * down[0].numel() // len(down)):
        multiple = FILLED
    pair, slot, ends = _slots(chosen.flatten(), len(gate_up), multiple)
    rows = cast(Tensor, _Spread.apply(x, pair, slot, top_k))  # [S,D]
    gate, up = _grouped(rows, gate_up.flatten(1, 2).mT, ends).chunk(2, -1)  # [S,F]
    out = _grouped(F.silu(gate) * up, down, ends)  # [S,D]
    out = cast(Tensor, _Gather.apply(out, pair, slot))  # [N*k,D] token by token again
    return (out.unflatten(0, (-1, top_k)) * gates.unsqueeze(-1)).sum(1)


def _grouped(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """rows [S,in] in groups that end at ends [E], weight [E,in,out] -> [S,out]"""
    y = onednn.grouped(rows, weight.mT, ends)
    return F.grouped_mm(rows, weight, offs=ends) if y is None else y


def _slots(expert: Tensor, experts: int, multiple: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where each (token, expert) pair goes: pair of each slot [S], slot of each pair [N*k], ends of groups [E].

    S = N*k and both are permutations, unless groups are filled up: an idle slot names pair 0, and as no
    pair names that slot, what it computes is never read and its gradient is 0.
    """
    order = expert.argsort(stable=True)  # pairs, expert by expert
    index = torch.arange(len(order), device=expert.device)
    counts = torch.bincount(expert, minlength=experts)
    if multiple == 1:
        return order, torch.empty_like(order).scatter_(0, order, index), counts.cumsum(0).to(torch.int32)
    room = (counts + multiple - 1) // multiple * multiple
    ends = room.cumsum(0)
    shift = (ends - room) - (counts.cumsum(0) - counts)  # how far the filling before it moves a group
    slot = torch.empty_like(order).scatter_(0, order, index + shift[expert[order]])
    pair = torch.zeros(int(ends[-1]), dtype=order.dtype, device=order.device).scatter_(0, slot, index)
    return pair, slot, ends.to(torch.int32)


class _Spread(torch.autograd.Function):
    """Every row k times, in expert order: x[pair // k]. The gradient sums a token's k copies."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, pair: Tensor, slot: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(slot)
        ctx.top_k = top_k
        return x.index_select(0, pair // top_k)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (slot,) = ctx.saved_tensors
        return grads[0].index_select(0, slot).unflatten(0, (-1, ctx.top_k)).sum(1), None, None, None


class _Gather(torch.autograd.Function):
    """x[slot]: its gradient is a gather too if that is a permutation, where autograd would scatter-add."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, pair: Tensor, slot: Tensor) -> Tensor:
        ctx.save_for_backward(pair, slot)
        return x.index_select(0, slot)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (g,), (pair, slot) = grads, ctx.saved_tensors
        if len(pair) == len(slot):
            return g.index_select(0, pair), None, None
        return g.new_zeros(len(pair), g.shape[1]).index_copy_(0, slot, g), None, None
