"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, eq. 9-19), both forms side by side.

    c   = norm(W_dkv h)                   the latent, cached           [C = kv_rank]
    k_r = RoPE(W_kr h)                    one key shared by all heads, cached
    [k_c ; v]_i = W_ukv,i c               per head, never cached
    q_i = [q_c ; RoPE(q_r)]_i = W_uq,i norm(W_dq h)        (or W_q,i h without query compression)
    o_i = softmax((q_c . k_c + q_r . k_r) / sqrt(nope + rope) x m^2) v_i,    y = W_o [o_1 .. o_H]

Expanded (training, prefill): build k_c and v and attend as usual.
Absorbed (decode): q_c . (W_uk c) = (W_uk^T q_c) . c, so a step is multi-query attention over the
cached latent itself, and W_uv is applied to the C-wide result. The keys and values of the context
are never formed. m is YaRN's temperature and 1 without it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trivet.model.attention import attend, attend_documents, attend_kept
from trivet.model.bounded import Ring, Voted
from trivet.model.cache import LatentCache
from trivet.model.compressed import LowRank
from trivet.model.layers import Layout, Linear, Norms, apply_rope, yarn_temperature
from trivet.model.native import FEW_QUERIES, FEW_ROWS, kernels
from trivet.spec import MLA

Memory = LatentCache | Ring | Voted
EXPANDED = 2**19  # numbers of keys and values that a prompt's piece has at a time, if a head has no more


class LatentAttention(nn.Module):
    def __init__(self, spec: MLA, d_model: int, norm: Norms) -> None:
        super().__init__()
        self.spec = spec
        q_width = spec.heads * spec.qk_dim
        if spec.q_rank is None:
            self.q_proj = nn.Sequential(Linear(d_model, q_width))
        else:
            self.q_proj = nn.Sequential(Linear(d_model, spec.q_rank), norm(spec.q_rank), Linear(spec.q_rank, q_width))
        self.kv_down = Linear(d_model, spec.kv_rank + spec.rope.dims)
        self.kv_norm = norm(spec.kv_rank)
        self.kv_up = Linear(spec.kv_rank, spec.heads * (spec.nope_dim + spec.v_dim))
        self.o_proj = Linear(spec.heads * spec.v_dim, d_model)
        yarn = spec.rope.yarn
        temperature = yarn_temperature(yarn, yarn.mscale_all_dim) if yarn else 1.0
        self.scale = spec.qk_dim**-0.5 * temperature**2

    def new_cache(self, rows: int, slots: int, dtype: torch.dtype, device: torch.device) -> LatentCache:
        return LatentCache(self.spec, rows, slots, dtype, device)

    def forward(self, x: Tensor, layout: Layout, cache: Memory | None = None) -> Tensor:
        """x [B,T,D] -> [B,T,D]; a few queries a row with a cache are absorbed, all else expanded."""
        s = self.spec
        rotation = layout.rotation(s.rope)
        q = self.q_proj(x).unflatten(-1, (s.heads, s.qk_dim))  # [B,T,H,nope+rope]
        q_nope, q_rope = q.split((s.nope_dim, s.rope.dims), -1)
        q_rope = apply_rope(q_rope, rotation, s.rope.interleaved)
        latent, k_rope = self.kv_down(x).split((s.kv_rank, s.rope.dims), -1)
        k_rope = apply_rope(k_rope.unsqueeze(2), rotation, s.rope.interleaved).squeeze(2)
        memory = torch.cat((self.kv_norm(latent), k_rope), -1)  # [B,T,C+rope]
        if cache is not None:
            assert layout.positions is not None and layout.span is not None
            if isinstance(cache, Ring | Voted):
                memory = cache.update((memory.unsqueeze(2),), layout.positions, layout.span)[0].squeeze(1)
            else:
                memory = cache.update(memory, layout.positions, layout.span)  # [B,S,C+rope]
        # For each remembered token expanding costs C (nope + v) a head once, absorbing C - nope + C - v more a query.
        few = x.shape[1] * (2 * s.kv_rank - s.nope_dim - s.v_dim) <= s.kv_rank * (s.nope_dim + s.v_dim)
        form = self.absorbed if cache is not None and layout.prompt is None and few else self.expanded
        y = form(q_nope, q_rope, memory, layout, cache)  # [B,T,H,v]
        return self.o_proj(y.flatten(2))

    def expanded(
        self, q_nope: Tensor, q_rope: Tensor, memory: Tensor, layout: Layout, cache: Memory | None = None
    ) -> Tensor:
        """Form every head's keys and values from the latents, then attend. -> [B,T,H,v]

        Of a prompt's piece a few heads at a time, so that keys and values never stand beside the cache in full.
        """
        s = self.spec
        latent, k_rope = memory.split((s.kv_rank, s.rope.dims), -1)
        width = s.nope_dim + s.v_dim
        if isinstance(cache, LowRank):
            latent = latent @ cache.back
        q = torch.cat((q_nope, q_rope), -1)
        some = s.heads if layout.prompt is None else max(1, EXPANDED // (memory[..., 0].numel() * (s.qk_dim + s.v_dim)))
        done = []
        for part in (slice(i, i + some) for i in range(0, s.heads, some)):
            rows = slice(part.start * width, part.stop * width)
            kv = self.kv_up.some(latent, rows).unflatten(-1, (-1, width))  # [B,S,H,nope+v]
            k_nope, v = kv.split((s.nope_dim, s.v_dim), -1)
            k = torch.cat((k_nope, k_rope.unsqueeze(2).expand(-1, -1, k_nope.shape[2], -1)), -1)
            if isinstance(cache, Ring | Voted):
                done.append(attend_kept(q[:, :, part], k, v, cache, layout, self.scale))
            else:
                done.append(attend_documents(q[:, :, part], k, v, layout, self.scale))
        return done[0] if len(done) == 1 else torch.cat(done, 2)

    def absorbed(
        self, q_nope: Tensor, q_rope: Tensor, memory: Tensor, layout: Layout, cache: Memory | None = None
    ) -> Tensor:
        """Attend over the latents themselves: one (C+rope)-wide key, one C-wide value. -> [B,T,H,v]"""
        s = self.spec
        up = self.kv_up.matrix().view(s.heads, s.nope_dim + s.v_dim, s.kv_rank)  # [H,nope+v,C]
        w_uk, w_uv = up.split((s.nope_dim, s.v_dim), 1)
        batch, length = q_nope.shape[:2]
        q_c = per_head(q_nope.flatten(0, 1), w_uk)  # [B*T,H,C]
        if isinstance(cache, LowRank):
            q_c = q_c @ cache.back.T  # the query in the memory's coordinates
        q = torch.cat((q_c.unflatten(0, (batch, length)), q_rope), -1)  # [B,T,H,C+rope]
        # The values are the latents; the rotated key rides along, which is cheaper than cutting it off.
        shared, fast = memory.unsqueeze(2), kernels(q, memory)  # [B,S,1,C+rope]
        if isinstance(cache, Ring | Voted):
            y = attend_kept(q, shared, shared, cache, layout, self.scale)
        elif fast is not None and layout.cached and length <= FEW_QUERIES:
            assert layout.positions is not None
            y = fast.attend(q, shared, shared[..., : s.kv_rank], layout.positions, self.scale, None)
        else:
            mask = layout.mask(dtype=memory.dtype)
            y = attend(q.transpose(1, 2), memory.unsqueeze(1), memory.unsqueeze(1), mask, self.scale).transpose(1, 2)
        y = y[..., : s.kv_rank]  # [B,T,H,C]
        if isinstance(cache, LowRank):
            y = y @ cache.back
        return per_head(y.flatten(0, 1), w_uv.transpose(-1, -2)).unflatten(0, (batch, length))


def per_head(x: Tensor, weight: Tensor) -> Tensor:
    """x [N,H,in], weight [H,in,out] -> [N,H,out]: every head's own matrix, over all N rows at once."""
    fast = kernels(x, weight)
    if fast is not None and len(x) <= FEW_ROWS:
        return fast.per_head(x, weight)
    return (x.transpose(0, 1) @ weight).transpose(0, 1)
