"""Grouped-query attention (arXiv 2305.13245): H query heads share K key/value heads.

    q, k, v = W_q x, W_k x, W_v x        (q, k normed per head if qk_norm, then RoPE on the first dims)
    y = W_o softmax(q k^T / sqrt(head_dim) + mask) v

K = H is multi-head, K = 1 multi-query attention. `attend` is the one softmax-attention call of the
package: PyTorch's fused kernel for rows of queries, a folded-head matrix product for one query.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trivet.model.cache import KVCache
from trivet.model.layers import Layout, Linear, RMSNorm, apply_rope, causal
from trivet.spec import GQA


class Attention(nn.Module):
    def __init__(self, spec: GQA, d_model: int, norm_eps: float) -> None:
        super().__init__()
        self.spec = spec
        self.q_proj = Linear(d_model, spec.heads * spec.head_dim, bias=spec.qkv_bias)
        self.k_proj = Linear(d_model, spec.kv_heads * spec.head_dim, bias=spec.qkv_bias)
        self.v_proj = Linear(d_model, spec.kv_heads * spec.head_dim, bias=spec.qkv_bias)
        self.o_proj = Linear(spec.heads * spec.head_dim, d_model)
        self.q_norm = RMSNorm(spec.head_dim, norm_eps) if spec.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(spec.head_dim, norm_eps) if spec.qk_norm else nn.Identity()

    def new_cache(self, rows: int, slots: int, dtype: torch.dtype, device: torch.device) -> KVCache:
        return KVCache(self.spec, rows, slots, dtype, device)

    def forward(self, x: Tensor, layout: Layout, cache: KVCache | None = None) -> Tensor:
        """x [B,T,D] -> [B,T,D]. cache=None is the training path."""
        s = self.spec
        q = self.q_norm(self.q_proj(x).unflatten(-1, (s.heads, s.head_dim)))  # [B,T,H,hd]
        k = self.k_norm(self.k_proj(x).unflatten(-1, (s.kv_heads, s.head_dim)))  # [B,T,K,hd]
        v = self.v_proj(x).unflatten(-1, (s.kv_heads, s.head_dim))
        q, k = self._rotate(q, layout), self._rotate(k, layout)
        if cache is not None:
            assert layout.positions is not None and layout.span is not None
            k, v = (x.transpose(1, 2) for x in cache.update(k, v, layout.positions, layout.span))  # [B,S,K,hd]
        y = attend_documents(q, k, v, layout, s.head_dim**-0.5, s.window)  # [B,T,H,hd]
        return self.o_proj(y.flatten(2))

    def _rotate(self, x: Tensor, layout: Layout) -> Tensor:
        rope = self.spec.rope
        if rope.dims == 0:
            return x
        turned = apply_rope(x[..., : rope.dims], layout.rotation(rope), rope.interleaved)
        return turned if rope.dims == x.shape[-1] else torch.cat((turned, x[..., rope.dims :]), -1)


def attend_documents(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float, window: int | None = None
) -> Tensor:
    """Attention within each document of a call: q [B,T,H,hd], k [B,S,K,hd], v [B,S,K,vd] -> [B,T,H,vd].

    Two forms: masked rows, or document by document where packed rows would mostly compute what is masked.
    """
    apart = layout.apart()
    if apart is None:
        return _attend_rows(q, k, v, layout.mask(window), scale)
    done = []
    for one_q, one_k, one_v in zip(apart.split(q), apart.split(k), apart.split(v), strict=True):
        mask = None if window is None else causal(one_q.shape[1], window, q.device)
        done.append(_attend_rows(one_q, one_k, one_v, mask, scale))
    return apart.join(done, len(q))


def _attend_rows(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    return attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask, scale).transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """softmax(q k^T scale) v for q [B,H,T,hd], k [B,K,S,hd], v [B,K,S,vd] -> [B,H,T,vd].

    mask: bool [B,1,T,S], True where a key is seen; None: causal (T = S).
    """
    heads, kv_heads, width = q.shape[1], k.shape[1], v.shape[-1]
    if q.shape[2] == 1 and mask is not None:
        # One query a row (decode): the query heads of a group become rows of one product, so that
        # keys are read once and never repeated.
        q = q.reshape(q.shape[0], kv_heads, heads // kv_heads, -1)  # [B,K,H/K,hd]
        one = _products if q.device.type == "cuda" else F.scaled_dot_product_attention
        return one(q, k, v, attn_mask=mask, scale=scale).flatten(1, 2).unsqueeze(2)
    dtype = q.dtype
    if dtype == torch.bfloat16 and q.device.type == "cpu" and torch.is_grad_enabled() and q.shape[2] < 256:
        # The CPU kernel's bf16 backward takes 3.6 times its fp32 one at T = 64, the same at 256, less beyond.
        q, k, v = q.float(), k.float(), v.float()
    if v.shape[-1] < k.shape[-1]:  # fused kernels want equal widths (MLA's values are narrower)
        v = F.pad(v, (0, k.shape[-1] - v.shape[-1]))
    y = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=heads != kv_heads
    )
    return y[..., :width].to(dtype)


def _products(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor, scale: float) -> Tensor:
    """Two batched products: a GPU's fused kernels would give a short query too few blocks to work on."""
    scores = (q @ k.transpose(-1, -2)).float() * scale  # [B,K,H/K,S]
    return scores.masked_fill(~attn_mask, float("-inf")).softmax(-1).to(v.dtype) @ v
