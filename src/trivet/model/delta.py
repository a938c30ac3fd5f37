"""Gated DeltaNet (arXiv 2412.06464), with the parts around it that Qwen3-Next has.

    q, k, v = silu(conv(W_qkv x))         a causal filter of 4 tokens a channel
    q, k    = q/|q| / sqrt(dk), k/|k|     shared by heads/key_heads consecutive value heads
    b_t     = sigmoid(W_b x)              how much of what stands under k_t is replaced
    g_t     = -exp(A) softplus(W_a x + dt)        log of the decay, <= 0
    S_t     = e^(g_t) S_(t-1) + b_t k_t^T (v_t - k_t e^(g_t) S_(t-1)),    o_t = q_t S_t
    y       = W_o (norm(o) * silu(W_z x))         one norm a head

Where lightning attention only adds to its state, the delta rule first reads what the state holds for a
key and writes the difference. Two equal forms:

    recurrent   the recurrence, token by token        the definition; decode, O(1) a token
    chunked     a chunk's writes at once, the state between chunks      training and prefill

In a chunk with G_t = g_1 + .. + g_t the written values u solve a triangular system (the WY or UT form):

    (I + A) u = b v - b k e^G S,    A_ij = b_i (k_i . k_j) e^(G_i - G_j) for i > j
    o = q e^G S + ((Q K^T) * e^(G_i - G_j)) u,    S' = e^(G_last) S + (k e^(G_last - G))^T u

Documents of a packed row are kept apart in both forms and in the convolution. Padding has b = g = 0, so
it leaves the state as it is. State, decay and all products here are fp32.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trivet.model.cache import DeltaCache
from trivet.model.layers import Layout, Linear, RMSNorm, exact
from trivet.spec import GatedDeltaNet

CHUNK = 32  # tokens a chunk: inside it work grows with its square, between chunks with the state (docs/LOG.md)
EPS = 1e-6  # of the unit length of queries and keys


class GatedDelta(nn.Module):
    def __init__(self, spec: GatedDeltaNet, d_model: int, norm_eps: float) -> None:
        super().__init__()
        self.spec = spec
        keys, values = spec.key_heads * spec.key_dim, spec.heads * spec.value_dim
        self.q_proj, self.k_proj = Linear(d_model, keys), Linear(d_model, keys)
        self.v_proj, self.gate = Linear(d_model, values), Linear(d_model, values)
        self.beta_proj, self.decay_proj = Linear(d_model, spec.heads), Linear(d_model, spec.heads)
        self.conv = nn.Parameter(torch.empty(spec.conv_width, 1, spec.conv))  # of the channels of q, k, v
        self.A_log = nn.Parameter(torch.empty(spec.heads))
        self.dt_bias = nn.Parameter(torch.empty(spec.heads))
        self.norm = RMSNorm(spec.value_dim, norm_eps)
        self.o_proj = Linear(values, d_model)

    def new_cache(self, rows: int, slots: int, dtype: torch.dtype, device: torch.device) -> DeltaCache:
        return DeltaCache(self.spec, rows, slots, dtype, device)

    def forward(self, x: Tensor, layout: Layout, cache: DeltaCache | None = None) -> Tensor:
        """x [B,T,D] -> [B,T,D]; one token with a cache is the recurrent form, all else chunked."""
        inputs = torch.cat((self.q_proj(x), self.k_proj(x), self.v_proj(x)), -1).float()  # [B,T,W]
        beta, rate = self.beta_proj(x).float(), self.decay_proj(x).float()  # [B,T,H]
        with exact(x):
            o = self.norm(layout.along(partial(self._rows, cache=cache), inputs, beta, rate))
        return self.o_proj(o.flatten(2).to(x.dtype) * F.silu(self.gate(x)))

    def _rows(
        self, layout: Layout, inputs: Tensor, beta: Tensor, rate: Tensor, cache: DeltaCache | None = None
    ) -> Tensor:
        """inputs [B,T,W], beta and rate [B,T,H] before their functions -> o [B,T,H,dv]."""
        s, (batch, length, _) = self.spec, inputs.shape
        if cache is None:
            state = inputs.new_zeros(batch, s.heads, s.key_dim, s.value_dim)
            before = inputs.new_zeros(batch, s.conv - 1, s.conv_width)
        else:
            state, before = cache.read(batch)
        mixed, after = short_conv(inputs, self.conv.float(), layout.positions, before)
        q, k, v = self._heads(F.silu(mixed))
        g = -self.A_log.float().exp() * F.softplus(rate + self.dt_bias.float())
        beta = beta.sigmoid()
        if layout.positions is not None:
            real = (layout.positions >= 0).unsqueeze(-1)
            g, beta = g * real, beta * real
        form = recurrent if cache is not None and length == 1 else chunked
        o, state = form(q, k, v, g.transpose(1, 2), beta.transpose(1, 2), layout.documents(), state)
        if cache is not None:
            cache.write(state, after)
        return o.transpose(1, 2)

    def _heads(self, mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B,T,W] -> q, k [B,H,T,dk] of unit length (q scaled), v [B,H,T,dv]."""
        s = self.spec
        keys = s.key_heads * s.key_dim
        q, k, v = mixed.split((keys, keys, s.heads * s.value_dim), -1)
        q, k = (unit(part.unflatten(-1, (s.key_heads, s.key_dim))).transpose(1, 2) for part in (q, k))  # [B,K,T,dk]
        q, k = (part.repeat_interleave(s.heads // s.key_heads, 1) for part in (q * s.key_dim**-0.5, k))
        return q, k, v.unflatten(-1, (s.heads, s.value_dim)).transpose(1, 2)


def unit(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + EPS)


def short_conv(x: Tensor, weight: Tensor, positions: Tensor | None, before: Tensor) -> tuple[Tensor, Tensor]:
    """A causal filter a channel that sees its own document only: x [B,T,W], weight [W,1,n] -> [B,T,W].

    `before` [B,n-1,W] is what came before each row's first token (zeros: nothing); the second result is
    the same for a later call. A document's tokens stand side by side, padding around them.
    """
    reach = weight.shape[-1] - 1
    if positions is None:
        seen = torch.cat((before, x), 1)
        return F.conv1d(seen.mT, weight, groups=x.shape[-1]).mT, seen[:, -reach:]
    seen = torch.cat((torch.zeros_like(before), x), 1)  # token t of the call at t + reach
    valid, steps = positions >= 0, torch.arange(reach, device=x.device)
    first = valid.long().argmax(-1, keepdim=True)  # [B,1]
    rows = torch.arange(len(x), device=x.device).unsqueeze(-1)
    seen = seen.index_put((rows, first + steps), before)  # right before the first token, over padding
    out = seen[:, reach:] * weight[:, 0, reach]
    for back in range(1, reach + 1):
        theirs = seen[:, reach - back : seen.shape[1] - back]
        out = out + theirs * (positions >= back).unsqueeze(-1) * weight[:, 0, reach - back]
    last = (valid.long() * torch.arange(1, x.shape[1] + 1, device=x.device)).amax(-1, keepdim=True)  # 0: no token
    return out, seen[rows, last + steps]


# --------------------------------------------------------------------------------------- the delta rule
def recurrent(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, documents: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The definition, q, k [B,H,T,dk], v [B,H,T,dv], g, beta [B,H,T] -> (o [B,H,T,dv], state [B,H,dk,dv]).

    `state` is what each row remembers. It belongs to document 0 of the call, the one that does not begin
    with a position 0.
    """
    outputs, before = [], torch.zeros_like(documents[:, 0])
    for t in range(q.shape[2]):
        goes_on = (documents[:, t] == before)[:, None, None, None]
        state = state * g[:, :, t, None, None].exp() * goes_on
        key = k[:, :, t].unsqueeze(-2)  # [B,H,1,dk]
        change = (v[:, :, t].unsqueeze(-2) - key @ state) * beta[:, :, t, None, None]  # [B,H,1,dv]
        state = state + key.mT @ change
        outputs.append(q[:, :, t].unsqueeze(-2) @ state)
        before = documents[:, t]
    return torch.cat(outputs, 2), state


def chunked(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, documents: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The same, O(T): all that does not need the state for all chunks [n of c tokens] at once, then chunk by chunk."""
    length, size = q.shape[2], min(CHUNK, q.shape[2])
    fill = -length % size
    q, k, v = (F.pad(x, (0, 0, 0, fill)).unflatten(2, (-1, size)) for x in (q, k, v))  # [B,H,n,c,d]
    g, beta = (F.pad(x, (0, fill)).unflatten(2, (-1, size)) for x in (g, beta))  # [B,H,n,c]
    doc = torch.cat((documents, documents[:, -1:].expand(-1, fill)), 1).unflatten(1, (-1, size))  # [B,n,c]
    came = F.pad(doc[:, :-1, -1], (1, 0)).unsqueeze(-1)  # [B,n,1] whose state a chunk is given
    reached, stays = (doc == came).unsqueeze(1), (doc == doc[..., -1:]).unsqueeze(1)  # [B,1,n,c]
    sees = (doc.unsqueeze(-1) == doc.unsqueeze(-2)).tril().unsqueeze(1)  # [B,1,n,c,c]

    # G_i - G_j as a sum of what lies between: a difference would lose small decays beside a large one.
    between = g.unsqueeze(-1).expand(*g.shape, size).tril(-1).cumsum(-2)  # [B,H,n,c,c]
    decay = between.masked_fill(~sees, float("-inf")).exp()
    into = (g.cumsum(-1).exp() * reached).unsqueeze(-1)
    keyed = k * beta.unsqueeze(-1)
    right = torch.cat((v * beta.unsqueeze(-1), keyed * into), -1)
    solved = torch.linalg.solve_triangular((keyed @ k.mT) * decay, right, upper=False, unitriangular=True)
    value, read = solved.split((v.shape[-1], k.shape[-1]), -1)  # u = value - read S
    scores = (q @ k.mT) * decay
    query = q * into
    key = k * (between[..., -1, :].exp() * stays).unsqueeze(-1)
    kept = into[..., -1:, :]  # [B,H,n,1,1]

    outputs = []
    parts = (x.unbind(2) for x in (value, read, query, scores, key, kept))  # one by one, backward would fill T^2 zeros
    for value_n, read_n, query_n, scores_n, key_n, kept_n in zip(*parts, strict=True):
        u = value_n - read_n @ state
        outputs.append(query_n @ state + scores_n @ u)
        state = state * kept_n + key_n.mT @ u
    return torch.cat(outputs, 2)[:, :, :length], state
