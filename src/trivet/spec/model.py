"""Residual styles, and the model: layers by name, and the arithmetic over all of them."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Annotated, Literal, TypeVar

from pydantic import Field, model_validator

from trivet.spec.ffns import FFN
from trivet.spec.frozen import Frozen
from trivet.spec.mixers import GQA, MLA, GatedDeltaNet, Lightning, Mixer
from trivet.spec.pattern import expand_pattern

T = TypeVar("T")


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
    residuals: dict[str, Residual] = Field(default_factory=lambda: dict[str, Residual](pre=PreNorm()))
    tie_embeddings: bool = True
    norm_eps: float = 1e-6
    centred_norms: bool = False  # norms keep their weight minus 1, as Qwen3-Next; not those within linear attention
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
    if isinstance(mixer, Lightning | GatedDeltaNet):
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
