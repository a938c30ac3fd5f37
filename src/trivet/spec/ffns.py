"""What is done to each token alone, as data: one SwiGLU, or many of which a token meets a few."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from trivet.spec.frozen import Frozen


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
