"""How tokens see each other, as data: every mixer prices its parameters, its cache and its FLOPs."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from trivet.spec.frozen import Frozen
from trivet.spec.positions import DualChunks, Rope


class GQA(Frozen):
    """Grouped-query attention (arXiv 2305.13245); kv_heads = heads is MHA, kv_heads = 1 is MQA."""

    kind: Literal["gqa"] = "gqa"
    heads: int = Field(gt=0)
    kv_heads: int = Field(gt=0)
    head_dim: int = Field(gt=0)
    rope: Rope
    qk_norm: bool = False  # RMSNorm of each query and key head before RoPE, as Qwen3
    qk_norm_over: Literal["head", "all"] = "head"  # all: one norm over all heads jointly, as MiniMax-M2
    out_gate: bool = False  # what attention found times sigmoid(W_g x) (arXiv 2505.06708), as Qwen3-Next
    qkv_bias: bool = False  # as Qwen2
    window: int | None = Field(default=None, gt=0)  # a query sees itself and window-1 before it
    chunks: DualChunks | None = None  # positions counted anew in every chunk, as Qwen2.5-1M

    @model_validator(mode="after")
    def _divides(self) -> GQA:
        if self.heads % self.kv_heads:
            raise ValueError(f"heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})")
        if self.rope.dims > self.head_dim:
            raise ValueError(f"rope.dims ({self.rope.dims}) exceeds head_dim ({self.head_dim})")
        if self.qk_norm_over == "all" and not self.qk_norm:
            raise ValueError("qk_norm_over 'all' needs qk_norm = true")
        if self.chunks is not None and (self.window is not None or self.rope.dims == 0):
            raise ValueError("chunks give rotary positions a bound: they need rope.dims > 0 and no window")
        return self

    def params(self, d: int) -> int:
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        biases = (q + 2 * kv) if self.qkv_bias else 0
        norms = {"head": 2 * self.head_dim, "all": q + kv}[self.qk_norm_over] if self.qk_norm else 0
        return self.matmul_params(d) + biases + norms

    def matmul_params(self, d: int) -> int:
        gate = self.heads if self.out_gate else 0
        return d * self.head_dim * (2 * (self.heads + self.kv_heads) + gate)

    def cache_per_token(self) -> int:
        return 2 * self.kv_heads * self.head_dim

    def state(self) -> int:
        return 0

    def context_flops(self, context: int) -> int:
        seen = context if self.window is None else min(context, self.window)
        return 4 * self.heads * self.head_dim * seen


class MLA(Frozen):
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, eq. 9-19), decoupled RoPE.

    The cache holds the normed latent and the rotated shared key: kv_rank + rope_dim numbers.
    """

    kind: Literal["mla"] = "mla"
    heads: int = Field(gt=0)
    kv_rank: int = Field(gt=0)
    q_rank: int | None = Field(default=None, gt=0)  # None: queries are not compressed (V2-Lite)
    nope_dim: int = Field(gt=0)
    v_dim: int = Field(gt=0)
    rope: Rope  # rope.dims is the decoupled part

    @property
    def qk_dim(self) -> int:
        return self.nope_dim + self.rope.dims

    def params(self, d: int) -> int:
        norms = self.kv_rank + (self.q_rank or 0)
        return self.matmul_params(d) + norms

    def matmul_params(self, d: int) -> int:
        if self.q_rank is None:
            q = d * self.heads * self.qk_dim
        else:
            q = d * self.q_rank + self.q_rank * self.heads * self.qk_dim
        kv = d * (self.kv_rank + self.rope.dims)
        kv += self.kv_rank * self.heads * (self.nope_dim + self.v_dim)
        return q + kv + self.heads * self.v_dim * d

    def cache_per_token(self) -> int:
        return self.kv_rank + self.rope.dims

    def state(self) -> int:
        return 0

    def context_flops(self, context: int) -> int:
        """Expanded form, the usual counting; absorbed decode is `absorbed_flops`."""
        return 2 * self.heads * (self.qk_dim + self.v_dim) * context

    def absorbed_flops(self, context: int) -> int:
        return 2 * self.heads * (2 * self.kv_rank + self.rope.dims) * context


class Lightning(Frozen):
    """Lightning attention as in MiniMax-01/M1 (arXiv 2501.08313): linear attention, fixed decay."""

    kind: Literal["lightning"] = "lightning"
    heads: int = Field(gt=0)
    head_dim: int = Field(gt=0)
    norm_eps: float = 1e-6

    def params(self, d: int) -> int:
        return self.matmul_params(d) + self.heads * self.head_dim

    def matmul_params(self, d: int) -> int:
        return 5 * d * self.heads * self.head_dim  # q, k, v, output gate, output

    def cache_per_token(self) -> int:
        return 0

    def state(self) -> int:
        return self.heads * self.head_dim * self.head_dim

    def context_flops(self, context: int) -> int:
        return 4 * self.heads * self.head_dim * self.head_dim  # independent of the context


class GatedDeltaNet(Frozen):
    """Gated delta rule (arXiv 2412.06464) as in Qwen3-Next: linear attention that can overwrite what it holds.

    `key_heads` query and key heads serve `heads` value heads, consecutive ones alike.
    """

    kind: Literal["delta"] = "delta"
    heads: int = Field(gt=0)  # value heads, each with a state of its own
    key_heads: int = Field(gt=0)
    key_dim: int = Field(gt=0)
    value_dim: int = Field(gt=0)
    conv: int = Field(default=4, gt=1)  # tokens that the causal convolution over q, k and v sees

    @model_validator(mode="after")
    def _divides(self) -> GatedDeltaNet:
        if self.heads % self.key_heads:
            raise ValueError(f"heads ({self.heads}) must be a multiple of key_heads ({self.key_heads})")
        return self

    @property
    def conv_width(self) -> int:
        return 2 * self.key_heads * self.key_dim + self.heads * self.value_dim

    def params(self, d: int) -> int:
        rates = 2 * self.heads  # A_log and dt_bias
        return self.matmul_params(d) + self.conv * self.conv_width + rates + self.value_dim

    def matmul_params(self, d: int) -> int:
        return d * (
            self.conv_width + 2 * self.heads * self.value_dim + 2 * self.heads
        )  # qkv, gate, output; beta, decay

    def cache_per_token(self) -> int:
        return 0

    def state(self) -> int:
        return self.heads * self.key_dim * self.value_dim + (self.conv - 1) * self.conv_width

    def context_flops(self, context: int) -> int:
        """Of the recurrence: read for the key, write, read for the query. Independent of the context."""
        return 6 * self.heads * self.key_dim * self.value_dim + 2 * self.conv * self.conv_width


Mixer = Annotated[GQA | MLA | Lightning | GatedDeltaNet, Field(discriminator="kind")]
