"""What a model is, as data: every layer names its mixer, its ffn and its residual style.

A `ModelSpec` is enough to build a `Transformer` and enough to price one: parameters, active
parameters, FLOPs and cache bytes are arithmetic on the spec, and the tests hold that arithmetic
against the tensors. No torch here, so planning costs nothing.

Depth is a pattern string. Each layer is `mixer/ffn` or `mixer/ffn/residual`, names pointing into
the spec's tables, with repetition and groups:

    "gqa/dense*28"                         Qwen3-0.6B
    "mla/dense*3 mla/moe*58"               DeepSeek-V3
    "(lightning/moe*7 gqa/moe)*10"         MiniMax-M1

Left out: anything that is not the model's identity (dtype, device, kernels, dropout).
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from trivet.pattern import expand_pattern

T = TypeVar("T")


class Frozen(BaseModel):
    """A value object: immutable, and an unknown key is an error rather than a shrug."""

    model_config = ConfigDict(frozen=True, extra="forbid")


# ---------------------------------------------------------------------------------------- positions
class Yarn(Frozen):
    """YaRN context extension (arXiv 2309.00071), with DeepSeek's two temperature settings.

    cos and sin are scaled by m(mscale)/m(mscale_all_dim) and MLA's softmax scale by
    m(mscale_all_dim)^2, where m(s) = 0.1 s ln(factor) + 1 (and m(0) = 1).
    """

    factor: float = Field(gt=1)
    original_length: int = Field(gt=0)
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0


class Llama3Scaling(Frozen):
    """Llama 3.1's context extension: pairs that turn slowly are slowed by `factor`, fast ones stay.

    With w the wavelength and r = original_length / w the turns in the original length, a pair's frequency is
    divided by `factor` where r < low_freq_factor, kept where r > high_freq_factor, and blended in between.
    """

    factor: float = Field(gt=1)
    original_length: int = Field(gt=0)
    low_freq_factor: float
    high_freq_factor: float


class Rope(Frozen):
    """Rotary positions on the first `dims` numbers of a head (0: no positions at all)."""

    dims: int = Field(ge=0)
    theta: float = 10000.0
    interleaved: bool = False  # pairs (2i, 2i+1) as DeepSeek, instead of halves (i, i + dims/2)
    yarn: Yarn | None = None
    llama3: Llama3Scaling | None = None

    @model_validator(mode="after")
    def _makes_sense(self) -> Rope:
        if self.dims % 2:
            raise ValueError(f"rope.dims must be even, got {self.dims}")
        if self.yarn is not None and self.llama3 is not None:
            raise ValueError("a rope is extended by yarn or by llama3, not by both")
        return self


# ------------------------------------------------------------------------------------------- mixers
class GQA(Frozen):
    """Grouped-query attention (arXiv 2305.13245); kv_heads = heads is MHA, kv_heads = 1 is MQA."""

    kind: Literal["gqa"] = "gqa"
    heads: int = Field(gt=0)
    kv_heads: int = Field(gt=0)
    head_dim: int = Field(gt=0)
    rope: Rope
    qk_norm: bool = False  # RMSNorm of each query and key head before RoPE, as Qwen3
    qkv_bias: bool = False  # as Qwen2
    window: int | None = Field(default=None, gt=0)  # a query sees itself and window-1 before it

    @model_validator(mode="after")
    def _divides(self) -> GQA:
        if self.heads % self.kv_heads:
            raise ValueError(f"heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})")
        if self.rope.dims > self.head_dim:
            raise ValueError(f"rope.dims ({self.rope.dims}) exceeds head_dim ({self.head_dim})")
        return self

    def params(self, d: int) -> int:
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        biases = (q + 2 * kv) if self.qkv_bias else 0
        norms = 2 * self.head_dim if self.qk_norm else 0
        return d * (q + 2 * kv) + q * d + biases + norms

    def matmul_params(self, d: int) -> int:
        return d * self.head_dim * 2 * (self.heads + self.kv_heads)

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


Mixer = Annotated[GQA | MLA | Lightning, Field(discriminator="kind")]


# --------------------------------------------------------------------------------------------- ffns
class SwiGLU(Frozen):
    """down(silu(gate x) * up x), arXiv 2002.05202."""

    kind: Literal["swiglu"] = "swiglu"
    hidden: int = Field(gt=0)

    def params(self, d: int) -> int:
        return 3 * d * self.hidden

    def active_params(self, d: int) -> int:
        return self.params(d)

    def matmul_params(self, d: int) -> int:
        return self.params(d)

    def matrix_params(self, d: int) -> int:
        return self.params(d)

    def idle_params(self, d: int, tokens: int) -> float:
        return 0.0


class MoE(Frozen):
    """DeepSeekMoE: shared plus fine-grained routed experts (arXiv 2401.06066, 2412.19437 eq. 12-20).

    Mixtral, Qwen3-MoE and MiniMax are settings of the same layer. No token is ever dropped.
    """

    kind: Literal["moe"] = "moe"
    experts: int = Field(gt=0)
    top_k: int = Field(gt=0)
    hidden: int = Field(gt=0)  # width of one routed expert
    shared_hidden: int = Field(default=0, ge=0)  # width of the shared expert(s), fused into one; 0: none
    shared_gate: bool = False  # the shared expert's output times sigmoid(w x), as Qwen2-MoE
    score: Literal["softmax", "sigmoid"] = "sigmoid"
    norm_topk: bool = True  # chosen weights are divided by their sum
    scale: float = 1.0  # routed scaling factor
    groups: int = Field(default=1, gt=0)  # group-limited routing: experts in `groups` groups, best `top_groups` kept
    top_groups: int = Field(default=1, gt=0)
    group_score: Literal["max", "top2"] = "top2"  # V2: the best expert; V3: sum of the two best
    selection_bias: bool = True  # V3's auxiliary-loss-free balancing bias, used for selection only
    bias_rate: float = 0.001  # gamma of its update rule
    balance: float = 0.0  # alpha of the sequence-wise balance loss

    @model_validator(mode="after")
    def _fits(self) -> MoE:
        if self.shared_gate and not self.shared_hidden:
            raise ValueError("shared_gate needs a shared expert: set shared_hidden")
        if self.experts % self.groups:
            raise ValueError(f"experts ({self.experts}) must divide into groups ({self.groups})")
        if self.groups > 1 and self.group_score == "top2" and self.experts < 2 * self.groups:
            raise ValueError(
                f"group_score 'top2' needs two experts a group, got {self.experts} in {self.groups} groups"
            )
        if self.top_groups > self.groups:
            raise ValueError(f"top_groups ({self.top_groups}) exceeds groups ({self.groups})")
        if self.top_k > self.top_groups * (self.experts // self.groups):
            raise ValueError(f"top_k ({self.top_k}) exceeds the experts in the kept groups")
        return self

    def params(self, d: int) -> int:
        bias = self.experts if self.selection_bias else 0
        routed = self.experts * 3 * d * self.hidden
        gate = d if self.shared_gate else 0
        return routed + 3 * d * self.shared_hidden + gate + d * self.experts + bias

    def active_params(self, d: int) -> int:
        return self.params(d) - (self.experts - self.top_k) * 3 * d * self.hidden

    def matmul_params(self, d: int) -> int:
        return self.active_params(d) - (self.experts if self.selection_bias else 0)

    def matrix_params(self, d: int) -> int:
        """What Muon trains: all experts, without the router, its bias and the shared expert's gate."""
        return 3 * d * (self.experts * self.hidden + self.shared_hidden)

    def idle_params(self, d: int, tokens: int) -> float:
        """Weights of the experts that none of `tokens` chose, expected: each misses one with 1 - k/E."""
        return self.experts * (1 - self.top_k / self.experts) ** tokens * 3 * d * self.hidden


FFN = Annotated[SwiGLU | MoE, Field(discriminator="kind")]


# ---------------------------------------------------------------------------------------- residuals
class PreNorm(Frozen):
    """x <- x + f(norm x)."""

    kind: Literal["pre"] = "pre"


class PostNorm(Frozen):
    """x <- alpha h + beta f(h) with h = norm(x): MiniMax-01's DeepNorm-like form."""

    kind: Literal["post"] = "post"
    mixer_alpha: float = 1.0
    mixer_beta: float = 1.0
    ffn_alpha: float = 1.0
    ffn_beta: float = 1.0


class DualResidual(Frozen):
    """ResiDual (arXiv 2304.14802): a post-norm stream x and an accumulator r that is never normed.

    f = F(x);  r <- r + gamma f;  x <- norm(x + f);  at the end of the model x + norm(r).
    """

    kind: Literal["dual"] = "dual"
    gamma: float = 1.0


Residual = Annotated[PreNorm | PostNorm | DualResidual, Field(discriminator="kind")]


# -------------------------------------------------------------------------------------------- model
class LayerSpec(Frozen):
    mixer: Mixer
    ffn: FFN
    residual: Residual


class ModelSpec(Frozen):
    """A whole model. `layers` is derived from `pattern` and the three tables."""

    vocab_size: int = Field(gt=0)
    d_model: int = Field(gt=0)
    pattern: str
    mixers: dict[str, Mixer]
    ffns: dict[str, FFN]
    residuals: dict[str, Residual] = {"pre": PreNorm()}
    tie_embeddings: bool = True
    norm_eps: float = 1e-6
    mtp: int = Field(default=0, ge=0)  # multi-token-prediction modules, each like the last layer
    context_length: int = Field(default=4096, gt=0)  # longest sequence the model is meant for

    @model_validator(mode="after")
    def _layers_resolve(self) -> ModelSpec:
        kinds = {layer.residual.kind for layer in self.layers}
        if "dual" in kinds and len(kinds) > 1:
            raise ValueError("a dual-residual model must use it in every layer")
        return self

    @property
    def layers(self) -> tuple[LayerSpec, ...]:
        return tuple(self._layer(name) for name in expand_pattern(self.pattern))

    def _layer(self, name: str) -> LayerSpec:
        mixer, ffn, residual = (name.split("/") + ["pre"])[:3]
        return LayerSpec(
            mixer=_look_up(self.mixers, mixer, "mixers", name),
            ffn=_look_up(self.ffns, ffn, "ffns", name),
            residual=_look_up(self.residuals | {"pre": PreNorm()}, residual, "residuals", name),
        )

    # --- size -------------------------------------------------------------------------------
    def num_params(self) -> int:
        """Every number in the state dict, tied embeddings counted once."""
        return self.main_params() + self.mtp_params()

    def main_params(self) -> int:
        """Of which plain decoding can meet: all but the multi-token-prediction modules. What vendors publish."""
        total = self.vocab_size * self.d_model * (1 if self.tie_embeddings else 2)
        total += self.d_model  # the final norm
        return total + sum(self._layer_params(layer) for layer in self.layers)

    def mtp_params(self) -> int:
        """Of which in multi-token-prediction modules, which plain decoding never meets."""
        return self.mtp * self._mtp_params()

    def active_params(self) -> int:
        """Parameters one token meets; both vocabulary tables counted (once if tied), MTP not."""
        idle = sum(layer.ffn.params(self.d_model) - layer.ffn.active_params(self.d_model)
                   for layer in self.layers)  # fmt: skip
        return self.main_params() - idle

    def touched_params(self, batch: int) -> float:
        """Parameters that one step of `batch` tokens is expected to read, if experts are chosen alike; MTP not."""
        idle = sum(layer.ffn.idle_params(self.d_model, batch) for layer in self.layers)
        return self.main_params() - idle

    def _layer_params(self, layer: LayerSpec) -> int:
        d = self.d_model
        return layer.mixer.params(d) + layer.ffn.params(d) + 2 * d

    def _mtp_params(self) -> int:
        d = self.d_model  # two input norms, one output norm, the 2D -> D projection, a layer
        return 3 * d + 2 * d * d + self._layer_params(self.layers[-1])

    # --- memory -----------------------------------------------------------------------------
    def cache_bytes_per_token(self, bytes_per_number: int = 2) -> int:
        """What one more token of context costs a sequence, all layers (bf16 by default).

        A window layer is counted in full here: it grows too, until its window is full.
        """
        return bytes_per_number * sum(layer.mixer.cache_per_token() for layer in self.layers)

    def state_bytes(self, bytes_per_number: int = 4) -> int:
        """The constant part of a sequence's memory: recurrent states (kept in fp32)."""
        return bytes_per_number * sum(layer.mixer.state() for layer in self.layers)

    # --- work -------------------------------------------------------------------------------
    def flops_per_token(self, context: int) -> int:
        """Forward FLOPs of one token that sees `context` positions (multiply and add are two)."""
        d = self.d_model
        matmuls = sum(layer.mixer.matmul_params(d) + layer.ffn.matmul_params(d) for layer in self.layers)
        attention = sum(layer.mixer.context_flops(context) for layer in self.layers)
        return 2 * (matmuls + self.vocab_size * d) + attention

    def decode_flops_per_token(self, context: int) -> int:
        """The same with MLA in its absorbed form, which is what decoding computes."""
        extra = sum(
            layer.mixer.absorbed_flops(context) - layer.mixer.context_flops(context)
            for layer in self.layers
            if isinstance(layer.mixer, MLA)
        )
        return self.flops_per_token(context) + extra

    def generation_flops(self, tokens: int, absorbed: bool = False) -> int:
        """Forward FLOPs of `tokens` written one after the other from an empty context.

        MLA is counted as most papers do, expanded, or `absorbed`.
        """
        d = self.d_model
        matmuls = sum(layer.mixer.matmul_params(d) + layer.ffn.matmul_params(d) for layer in self.layers)
        attention = sum(_summed(layer.mixer, tokens, absorbed) for layer in self.layers)
        return 2 * (matmuls + self.vocab_size * d) * tokens + attention

    def training_flops_per_token(self, length: int) -> int:
        """Forward and backward (3 x forward) with the mean causal context of a `length` row."""
        return 3 * self.flops_per_token((length + 1) // 2)


def _summed(mixer: Mixer, n: int, absorbed: bool) -> int:
    """Context FLOPs of positions 1 to n: they grow in a line up to the window, if there is one, then stay."""
    if isinstance(mixer, Lightning):
        return n * mixer.context_flops(1)
    one = mixer.absorbed_flops(1) if absorbed and isinstance(mixer, MLA) else mixer.context_flops(1)
    grows = min(n, mixer.window) if isinstance(mixer, GQA) and mixer.window else n
    return one * (grows * (grows + 1) // 2 + (n - grows) * grows)


def _look_up(table: Mapping[str, T], name: str, what: str, layer: str) -> T:
    if name in table:
        return table[name]
    near = difflib.get_close_matches(name, table, n=1, cutoff=0.0)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"layer {layer!r}: no {name!r} in {what}{hint}")
