"""Grouped-query attention (arXiv 2305.13245): H query heads share K key/value heads.

    q, k, v = W_q x, W_k x, W_v x        (q, k normed if qk_norm, per head or jointly; RoPE on the first dims)
    y = W_o softmax(q k^T / sqrt(head_dim) + mask) v        (times sigmoid(W_g x) before W_o if out_gate)

K = H is multi-head, K = 1 multi-query attention. `attend` is the one softmax-attention call of the
package: PyTorch's fused kernel for rows of queries, a folded-head matrix product for one query.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trivet.config import UserError
from trivet.model.blocks import Reach
from trivet.model.bounded import Ring, Voted
from trivet.model.cache import KVCache
from trivet.model.chunks import PARTS, Placed, attend_chunks, temperature
from trivet.model.layers import Layout, Linear, Norms, RMSNorm, added, apply_rope, causal, few_rows
from trivet.model.native import FEW_QUERIES, kernels
from trivet.model.sparse import attend_prompt
from trivet.spec import GQA


class Attention(nn.Module):
    def __init__(self, spec: GQA, d_model: int, norm: Norms) -> None:
        super().__init__()
        self.spec = spec
        self.q_proj = Linear(d_model, spec.heads * spec.head_dim, bias=spec.qkv_bias)
        self.k_proj = Linear(d_model, spec.kv_heads * spec.head_dim, bias=spec.qkv_bias)
        self.v_proj = Linear(d_model, spec.kv_heads * spec.head_dim, bias=spec.qkv_bias)
        self.o_proj = Linear(spec.heads * spec.head_dim, d_model)
        self.gate = Linear(d_model, spec.heads * spec.head_dim) if spec.out_gate else None
        widths = {"head": (1, 1), "all": (spec.heads, spec.kv_heads)}[spec.qk_norm_over]
        self.q_norm, self.k_norm = (norm(n * spec.head_dim) if spec.qk_norm else nn.Identity() for n in widths)

    def new_cache(self, rows: int, slots: int, dtype: torch.dtype, device: torch.device) -> KVCache:
        return KVCache(self.spec, rows, slots, dtype, device)

    def forward(self, x: Tensor, layout: Layout, cache: KVCache | Ring | Voted | None = None) -> Tensor:
        """x [B,T,D] -> [B,T,D]. cache=None is the training path."""
        s = self.spec
        v = self.v_proj(x).unflatten(-1, (s.kv_heads, s.head_dim))
        if s.chunks is None:
            turn = layout.rotation(s.rope)
            q = self._heads(x, self.q_proj, self.q_norm, turn)  # [B,T,H,hd]
            k = self._heads(x, self.k_proj, self.k_norm, turn)  # [B,T,K,hd]
        else:  # q [3,B,T,H,hd]: one rotation for each kind of chunk, and keys turned once
            turns = [layout.rotation(s.rope, Placed(s.chunks, part)) for part in PARTS]
            k = self._heads(x, self.k_proj, self.k_norm, turns[0])
            q = self._normed(self.q_proj(x), self.q_norm)
            q = torch.stack([apply_rope(q, turn, s.rope.interleaved) for turn in turns])
            if s.chunks.original_length is not None:
                q = q * temperature(layout.at(), s.chunks.original_length)[..., None, None].to(q.dtype)
        if cache is not None:
            assert layout.positions is not None and layout.span is not None
            read = cache.update((k, v), layout.positions, layout.span)  # [B,K,S,hd] each
            k, v = (x.transpose(1, 2) for x in read)  # [B,S,K,hd]
        if isinstance(cache, Ring | Voted):
            y = attend_kept(q, k, v, cache, layout, s.head_dim**-0.5)
        elif s.chunks is None:
            y = attend_documents(q, k, v, layout, s.head_dim**-0.5, s.window)  # [B,T,H,hd]
        else:
            y = attend_chunks(q, k, v, layout, s.chunks, s.head_dim**-0.5)
        y = y.flatten(2)
        return self.o_proj(y if self.gate is None else y * self.gate(x).sigmoid())

    def _heads(self, x: Tensor, proj: Linear, norm: nn.Module, turn: tuple[Tensor, Tensor]) -> Tensor:
        """x [B,T,D] -> [B,T,heads,hd]: multiplied, normed, turned."""
        s = self.spec
        weight, eps, centred = (
            (norm.weight, norm.eps, norm.centred) if isinstance(norm, RMSNorm) else (None, 0.0, False)
        )
        plain = type(proj) is Linear and proj.lora is None and (weight is None or weight.dtype == x.dtype)
        fast = few_rows(x, proj.weight) if plain else None
        if fast is None:
            return apply_rope(self._normed(proj(x), norm), turn, s.rope.interleaved)
        return fast.heads(x, proj.weight, proj.bias, s.head_dim, weight, eps, centred, *turn, s.rope.interleaved)

    def _normed(self, x: Tensor, norm: nn.Module) -> Tensor:
        """[B,T,heads hd] -> [B,T,heads,hd]"""
        if self.spec.qk_norm_over == "all":
            x = norm(x)
        x = x.unflatten(-1, (-1, self.spec.head_dim))
        return norm(x) if self.spec.qk_norm_over == "head" else x


def attend_documents(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float, window: int | None = None
) -> Tensor:
    """Attention within each document of a call: q [B,T,H,hd], k [B,S,K,hd], v [B,S,K,vd] -> [B,T,H,vd].

    Four forms: masked rows, document by document where packed rows would mostly compute what is masked, a
    prompt's piece in blocks, and a kernel for the few queries of a step of decoding.
    """
    if layout.prompt is not None:
        forms, reach = q.transpose(1, 2).unsqueeze(0), Reach(window)
        return attend_prompt(forms, k.transpose(1, 2), v.transpose(1, 2), scale, reach, layout.prompt).transpose(1, 2)
    fast = kernels(q, k, v)
    if fast is not None and layout.cached and q.shape[1] <= FEW_QUERIES:
        assert layout.positions is not None
        return fast.attend(q, k, v, layout.positions, scale, window)
    apart = layout.apart()
    if apart is None:
        return _attend_rows(q, k, v, layout.mask(window, v.dtype), scale)
    done = []
    for one_q, one_k, one_v in zip(apart.split(q), apart.split(k), apart.split(v), strict=True):
        mask = None if window is None else added(causal(one_q.shape[1], window, q.device), v.dtype)
        done.append(_attend_rows(one_q, one_k, one_v, mask, scale))
    return apart.join(done, len(q))


def attend_kept(q: Tensor, k: Tensor, v: Tensor, kept: Ring | Voted, layout: Layout, scale: float) -> Tensor:
    """Attention to what a bounded cache kept: q [B,T,H,hd], k [B,S,K,hd], v [B,S,K,vd] -> [B,T,H,vd].

    Raises UserError for sparse prefill, whose lines are found in a cache of every token.
    """
    assert layout.positions is not None
    if layout.prompt is not None and layout.prompt.sparse is not None:
        raise UserError("Sparse prefill chooses among all tokens of a prompt: give it a full or an int8 cache.")
    seen = kept.seen(layout.positions)
    if isinstance(kept, Ring):
        return _attend_rows(q, k, v, added(seen, v.dtype), scale)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = (q * scale).unflatten(1, (k.shape[1], -1)) @ k.unsqueeze(2).mT  # [B,K,H/K,T,S]
    weights = scores.float().masked_fill(~seen.unsqueeze(2), float("-inf")).softmax(-1)
    kept.vote(weights.flatten(1, 2), layout.positions)
    return (weights.to(v.dtype) @ v.unsqueeze(2)).flatten(1, 2).transpose(1, 2)


def _attend_rows(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    return attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask, scale).transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """softmax(q k^T scale) v for q [B,H,T,hd], k [B,K,S,hd], v [B,K,S,vd] -> [B,H,T,vd].

    mask: [B,1,T,S] in v's type, -inf where a key is not seen, else 0; None: causal (T = S).
    """
    heads, kv_heads, width = q.shape[1], k.shape[1], v.shape[-1]
    if products_win(q, k, mask):
        return _products(q, k, v, mask, scale)
    if q.shape[2] == 1 and mask is not None:
        # One query a row (decode): the query heads of a group become rows of one product, so that
        # keys are read once and never repeated.
        q = q.reshape(q.shape[0], kv_heads, heads // kv_heads, -1)  # [B,K,H/K,hd]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).flatten(1, 2).unsqueeze(2)
    if v.shape[-1] < k.shape[-1]:  # fused kernels want equal widths (MLA's values are narrower)
        v = F.pad(v, (0, k.shape[-1] - v.shape[-1]))
    y = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=heads != kv_heads
    )
    return y[..., :width]


MANY_ROWS = 8  # from here on a step of decoding is faster in products, on a CPU in fp32
LONGEST = {torch.float32: 512, torch.bfloat16: 2048}  # the same for longer rows, by type
MOST_SCORES = 2**24  # products keep a layer's scores for the backward pass, fused kernels do not
PIECE = 2**20  # scores worked on at a time: what a core's cache holds
BLOCK = {torch.float32: 128, torch.bfloat16: 256}  # queries that share the keys up to the last of them


def products_win(q: Tensor, k: Tensor, mask: Tensor | None) -> bool:
    """Whether plain products beat the fused kernel, forward and backward; measured in docs/LOG.md."""
    batch, heads, length, span = *q.shape[:3], k.shape[2]
    if length == 1:  # a GPU's fused kernels would give one query too few blocks to work on
        return q.is_cuda or (q.dtype == torch.float32 and batch >= MANY_ROWS)
    if q.device.type != "cpu" or batch * heads * length * span > MOST_SCORES:
        return False
    return length <= LONGEST.get(q.dtype, 0) and (mask is None or q.dtype == torch.bfloat16)


def _products(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Two batched products over (row, key head) pairs, on a CPU in pieces that its cache holds.

    The query heads of a group are rows of one product, so that keys are read once and never repeated.
    Without a mask, queries go block by block, each block with the keys that its last query sees.
    """
    batch, heads, length, _ = q.shape
    kv_heads, span = k.shape[1:3]
    pairs, group = batch * kv_heads, heads // kv_heads
    block = min(length, BLOCK.get(q.dtype, length)) if mask is None else length
    size = pairs if q.is_cuda else max(1, PIECE // (group * block * span))
    bias = added(causal(length, length, q.device), q.dtype) if mask is None else mask  # [B,1,T,S] or [1,1,T,S]
    if len(bias) > 1:
        bias = bias.expand(-1, kv_heads, -1, -1).reshape(pairs, 1, length, span)
    queries = (q * scale).reshape(pairs, group, length, -1)
    keys, values = k.flatten(0, 1), v.flatten(0, 1)
    done = []
    for piece in (slice(i, i + size) for i in range(0, pairs, size)):
        blocks = []
        for start in range(0, length, block):
            rows = slice(start, start + block)
            until = slice(min(start + block, span) if mask is None else span)
            scores = queries[piece, :, rows].flatten(1, 2) @ keys[piece, until].transpose(-1, -2)
            scores = scores.unflatten(1, (group, -1)).add_(bias[piece if len(bias) > 1 else slice(1), :, rows, until])
            weights = scores.softmax(-1)  # summed in fp32, whatever its type
            blocks.append((weights.flatten(1, 2) @ values[piece, until]).unflatten(1, (group, -1)))
        done.append(torch.cat(blocks, 2))  # [pairs,group,T,vd]
    return torch.cat(done).view(batch, heads, length, -1)
