"""Lightning attention (MiniMax-01, arXiv 2501.08313): linear attention with a fixed decay per head.

    q, k, v = silu(W_qkv x)               no RoPE, no softmax, no 1/sqrt(d)
    KV_t = e^(-s) KV_(t-1) + k_t^T v_t,   o_t = q_t KV_t
    y = W_o (sigmoid(W_g x) * norm(o))    one norm over all heads jointly

with s_(h,l) = 2^(-8(h+1)/H) (1 - l/(L-1) + 1e-5) for head h of layer l. Three equal forms:

    quadratic   O = (Q K^T * M) V,  M_ij = e^(-s(i-j)) for i >= j       the definition, O(T^2)
    chunked     quadratic inside a chunk, the state between chunks       training and prefill, O(T)
    recurrent   one step of the recurrence                               decode, O(1) a token

Documents of a packed row are kept apart in all of them: M is zero across documents, and a state is
carried only into the document that it came from. The state is always fp32.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from trivet.model.cache import StateCache
from trivet.model.layers import Float32Buffers, Layout, Linear, RMSNorm, exact
from trivet.spec import Lightning

CHUNK = 128  # tokens a chunk: the quadratic part costs 4 H T CHUNK hd, the state part 4 H T hd^2


class LightningAttention(Float32Buffers):
    slopes: Tensor

    def __init__(self, spec: Lightning, d_model: int, layer: int, layers: int) -> None:
        super().__init__()
        self.spec = spec
        width = spec.heads * spec.head_dim
        self.q_proj, self.k_proj, self.v_proj = (Linear(d_model, width) for _ in range(3))
        self.gate = Linear(d_model, width)
        self.norm = RMSNorm(width, spec.norm_eps)
        self.o_proj = Linear(width, d_model)
        self.register_buffer("slopes", decay_slopes(spec.heads, layer, layers), persistent=False)

    def new_cache(self, rows: int, slots: int, dtype: torch.dtype, device: torch.device) -> StateCache:
        return StateCache(self.spec, rows, slots, dtype, device)

    def forward(self, x: Tensor, layout: Layout, cache: StateCache | None = None) -> Tensor:
        """x [B,T,D] -> [B,T,D]; one token with a cache is the recurrent form, all else chunked."""
        s = self.spec
        q, k, v = (
            F.silu(p(x)).unflatten(-1, (s.heads, s.head_dim)).float() for p in (self.q_proj, self.k_proj, self.v_proj)
        )  # [B,T,H,hd]
        with exact(x):
            o = layout.along(partial(self._rows, cache=cache), q, k, v)
        o = self.norm(o.flatten(2).to(x.dtype))
        return self.o_proj(torch.sigmoid(self.gate(x)) * o)

    def _rows(self, layout: Layout, q: Tensor, k: Tensor, v: Tensor, cache: StateCache | None = None) -> Tensor:
        """q, k, v [B,T,H,hd] -> o [B,T,H,hd]."""
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if cache is None:
            o, _ = chunked(q, k, v, self.slopes, layout.documents(), layout.positions, None)
        else:
            assert layout.positions is not None
            form = recurrent if q.shape[2] == 1 else chunked
            o, state = form(q, k, v, self.slopes, layout.documents(), layout.positions, cache.read(len(q)))
            cache.write(state)
        return o.transpose(1, 2)


def decay_slopes(heads: int, layer: int, layers: int) -> Tensor:
    """[H] decay rates s: ALiBi's geometric slopes, shrinking with depth to almost 0 in the last layer."""
    heads_from_1 = torch.arange(1, heads + 1, dtype=torch.float32, device="cpu")  # also where weights have no device
    base = 2.0 ** (-8.0 * heads_from_1 / heads)
    return base * (1 - layer / max(layers - 1, 1) + 1e-5)


def quadratic(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, documents: Tensor, positions: Tensor | None) -> Tensor:
    """The definition, q, k, v [B,H,T,hd] -> [B,H,T,hd]: every pair of tokens, decayed and masked."""
    index = torch.arange(q.shape[2], device=q.device)
    distance = index.unsqueeze(-1) - index  # [T,T]
    decay = torch.exp(-slopes[:, None, None] * distance.clamp_min(0)) * (distance >= 0)  # [H,T,T]
    seen = documents.unsqueeze(-1) == documents.unsqueeze(-2)  # [B,T,T]
    if positions is not None:
        seen = seen & (positions >= 0).unsqueeze(-2)
    return ((q @ k.transpose(-1, -2)) * decay * seen.unsqueeze(1)) @ v


def chunked(
    q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, documents: Tensor, positions: Tensor | None, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """O(T) form: -> (o [B,H,T,hd], state after each row's last token [B,H,hd,hd]).

    `state` is what each row remembers (None: nothing). It belongs to document 0 of the call, the one
    that does not begin with a position 0, and stands one position before the row's first token.
    """
    batch, heads, length, dim = q.shape
    at = positions if positions is not None else torch.arange(length, device=q.device).expand(batch, -1)
    valid = at >= 0
    carried_doc = torch.zeros(batch, dtype=torch.long, device=q.device)
    first = valid.long().argmax(-1, keepdim=True)
    carried_at = at.gather(1, first).squeeze(1) - 1  # [B] position of the newest token in the state
    if state is None:
        state = q.new_zeros(batch, heads, dim, dim)
    outputs = []
    for start in range(0, length, CHUNK):
        part = slice(start, start + CHUNK)
        qc, kc, vc, doc, pos, ok = (
            q[:, :, part],
            k[:, :, part],
            v[:, :, part],
            documents[:, part],
            at[:, part],
            valid[:, part],
        )
        inside = quadratic(qc, kc, vc, slopes, doc, pos)
        # [B,H,t]: e^(-s x distance to the state's newest token), 0 in any other document
        reach = _decay(slopes, pos - carried_at[:, None], doc == carried_doc[:, None])
        outputs.append(inside + (qc @ state) * reach.unsqueeze(-1))
        any_valid = ok.any(-1)
        last = (ok.long() * torch.arange(1, ok.shape[1] + 1, device=q.device)).argmax(-1, keepdim=True)
        last_at = torch.where(any_valid, pos.gather(1, last).squeeze(1), carried_at)
        last_doc = torch.where(any_valid, doc.gather(1, last).squeeze(1), carried_doc)
        keep = _decay(slopes, (last_at - carried_at)[:, None], (last_doc == carried_doc)[:, None])  # [B,H,1]
        add = _decay(slopes, last_at[:, None] - pos, ok & (doc == last_doc[:, None]))  # [B,H,t]
        state = state * keep.unsqueeze(-1) + (kc * add.unsqueeze(-1)).transpose(-1, -2) @ vc
        carried_at, carried_doc = last_at, last_doc
    return torch.cat(outputs, 2), state


def recurrent(
    q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, documents: Tensor, positions: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One step of the recurrence, T = 1. Position 0 forgets the state, -1 leaves it as it is."""
    decay = torch.exp(-slopes)[None, :, None, None] * (positions > 0)[:, None, None]
    decay = torch.where((positions < 0)[:, None, None], 1.0, decay)
    new = k.transpose(-1, -2) @ v * (positions >= 0)[:, None, None]
    state = state * decay + new
    return q @ state, state


def _decay(slopes: Tensor, distance: Tensor, where: Tensor) -> Tensor:
    """e^(-s distance) where allowed, else 0: [B,t] -> [B,H,t]."""
    decay = torch.exp(-slopes[None, :, None] * distance.clamp_min(0).unsqueeze(1))
    return decay * where.unsqueeze(1)
