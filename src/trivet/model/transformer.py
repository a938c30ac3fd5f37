"""The Transformer: a spec made of tensors. The same forward pass trains, samples, evaluates, serves.

    x = embed(tokens);  for each layer: residual(mixer), residual(ffn);  hidden = norm(x);  logits = head hidden

How a layer joins its two parts is data too (`RESIDUALS`): pre-norm, MiniMax's post-norm, ResiDual.
Multi-token prediction (DeepSeek-V3, arXiv 2412.19437, section 2.2) is a chain of extra layers that
share embedding and head; the embedding comes first in eh_proj, as in the released checkpoints.

Left out: dropout, learned positions, biases (except Qwen2's qkv).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trivet.model.attention import Attention
from trivet.model.cache import LayerCache
from trivet.model.delta import GatedDelta
from trivet.model.ffn import DenseFFN, MoEFFN, Routing
from trivet.model.layers import Layout, Linear, Norms, RMSNorm, linear
from trivet.model.linear import LightningAttention
from trivet.model.mla import LatentAttention
from trivet.model.packed import Apart
from trivet.model.prompt import Prompt
from trivet.spec import DualResidual, LayerSpec, ModelSpec, PostNorm, PreNorm

Stream = tuple[Tensor, Tensor]  # (x, ResiDual's accumulator r; in the other styles r is empty)
Part = Callable[[Tensor], Tensor]


class Layer(nn.Module):
    """One mixer and one ffn, joined in the residual style that the spec names."""

    def __init__(self, spec: LayerSpec, model: ModelSpec, depth: int) -> None:
        super().__init__()
        self.spec = spec
        d, layers, norm = model.d_model, len(model.layers), norms_of(model)
        build: dict[str, Callable[[], nn.Module]] = {
            "gqa": lambda: Attention(spec.mixer, d, norm),  # type: ignore[arg-type]
            "mla": lambda: LatentAttention(spec.mixer, d, norm),  # type: ignore[arg-type]
            "lightning": lambda: LightningAttention(spec.mixer, d, min(depth, layers - 1), layers),  # type: ignore[arg-type]
            "delta": lambda: GatedDelta(spec.mixer, d, model.norm_eps),  # type: ignore[arg-type]
            "swiglu": lambda: DenseFFN.from_spec(spec.ffn, d),  # type: ignore[arg-type]
            "moe": lambda: MoEFFN.from_spec(spec.ffn, d),  # type: ignore[arg-type]
        }
        self.mixer = build[spec.mixer.kind]()
        self.ffn = build[spec.ffn.kind]()
        self.mixer_norm, self.ffn_norm = norm(d), norm(d)

    def forward(self, stream: Stream, layout: Layout, cache: LayerCache | None, routing: Routing | None) -> Stream:
        join = RESIDUALS[self.spec.residual.kind]
        stream = join(self.spec.residual, stream, lambda h: self.mixer(h, layout, cache), self.mixer_norm, "mixer")
        return join(self.spec.residual, stream, lambda h: self.ffn(h, layout, routing), self.ffn_norm, "ffn")


def norms_of(model: ModelSpec) -> Norms:
    return partial(RMSNorm, eps=model.norm_eps, centred=model.centred_norms)


def run_layer(
    layer: Layer, stream: Stream, layout: Layout, cache: LayerCache | None, routing: Routing | None, recompute: bool
) -> Stream:
    """One layer; with `recompute` its inside is not kept for the backward pass but computed there again.

    Activation checkpointing (arXiv 1604.06174): only the stream between layers stays. Both runs are the same
    operations, so gradients are equal to the bit; what the router notes is noted by the first run only.
    """
    if routing is None and not recompute:
        return layer(stream, layout, cache, None)
    replay = routing.next_replay(layer.ffn) if routing is not None else None

    def inside(x: Tensor, r: Tensor) -> tuple[Stream, Routing]:
        notes = Routing(replay=replay)  # of this layer alone: FSDP would copy one that already holds a gradient
        return layer((x, r), layout, cache, notes), notes

    if recompute:
        stream, notes = checkpoint(inside, *stream, use_reentrant=False, preserve_rng_state=False)
    else:
        stream, notes = inside(*stream)
    if routing is not None:
        routing.take(notes)
    return stream


def pre_norm(spec: PreNorm, stream: Stream, part: Part, norm: Part, which: str) -> Stream:
    x, r = stream
    return x + part(norm(x)), r


def post_norm(spec: PostNorm, stream: Stream, part: Part, norm: Part, which: str) -> Stream:
    x, r = stream
    alpha, beta = (spec.mixer_alpha, spec.mixer_beta) if which == "mixer" else (spec.ffn_alpha, spec.ffn_beta)
    h = norm(x)  # MiniMax: the residual is the normed stream
    return alpha * h + beta * part(h), r


def dual(spec: DualResidual, stream: Stream, part: Part, norm: Part, which: str) -> Stream:
    x, r = stream
    f = part(x)
    return norm(x + f), r + spec.gamma * f


RESIDUALS: dict[str, Callable[..., Stream]] = {"pre": pre_norm, "post": post_norm, "dual": dual}


class MTPModule(nn.Module):
    """Predicts one token further: layer(eh_proj [norm(emb(t+k)) ; norm(h)]), then its own norm."""

    def __init__(self, model: ModelSpec, depth: int) -> None:
        super().__init__()
        d, norm = model.d_model, norms_of(model)
        self.embed_norm, self.hidden_norm = norm(d), norm(d)
        self.eh_proj = Linear(2 * d, d)
        self.layer = Layer(model.layers[-1], model, depth)
        self.norm = norm(d)


class Transformer(nn.Module):
    """spec -> tensors. Raises ValueError (from the spec) where the pattern does not resolve.

    seed None leaves the weights uninitialised: they are about to be read.
    """

    def __init__(self, spec: ModelSpec, seed: int | None = 0) -> None:
        super().__init__()
        self.spec = spec
        self.residual = spec.layers[0].residual  # looking it up resolves the whole pattern: too slow for every step
        self.embed = nn.Parameter(torch.empty(spec.vocab_size, spec.d_model))
        self.layers = nn.ModuleList(Layer(layer, spec, i) for i, layer in enumerate(spec.layers))
        self.norm = norms_of(spec)(spec.d_model)
        self.head = None if spec.tie_embeddings else nn.Parameter(torch.empty(spec.vocab_size, spec.d_model))
        self.mtp = nn.ModuleList(MTPModule(spec, len(spec.layers) + k) for k in range(spec.mtp))
        if seed is not None:
            init_weights(self, seed)

    def with_spec(self, spec: ModelSpec) -> Transformer:
        """This model's tensors under another spec of the same shapes, e.g. with other positions. Nothing is copied."""
        with torch.device("meta"):
            other = Transformer(spec, seed=None)
        for name, module in self.named_modules():
            if isinstance(module, Linear | DenseFFN):  # where adapters are
                other.get_submodule(name).lora = module.lora  # type: ignore[assignment]
        other.load_state_dict(self.state_dict(), assign=True)
        return other.to(self.embed.device).train(self.training)

    # --- forward --------------------------------------------------------------------------------
    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        caches: Sequence[LayerCache] | None = None,
        span: int | None = None,
        routing: Routing | None = None,
        recompute: bool = False,
        prompt: Prompt | None = None,
        apart: Apart | None = None,
    ) -> Tensor:
        """tokens [B,T] -> hidden [B,T,D] after the final norm.

        positions [B,T]: 0 starts a document, -1 is padding; None: every row is one document. In training a fall to
            p > 0 goes on from the document's first p tokens, see packed.py.
        caches: one a layer, rows 0..B-1 of which are read and written; None: the training path.
        span: with caches, the largest position of this call + 1; None: computed (one host sync).
        recompute: keep for the backward pass only what flows between layers. Not with caches.
        prompt: with caches, that this is one piece of a long prompt in all rows (`prefill.py`).
        apart: Apart.of(positions), where it is known. On a GPU positions that branch need it.
        """
        layout = self._layout(tokens, positions, caches is not None, span)
        layout.prompt, layout.given = prompt, apart
        stream = self._enter(self.embed[tokens])
        for i, layer in enumerate(self.layers):
            cache = caches[i] if caches is not None else None
            stream = run_layer(layer, stream, layout, cache, routing, recompute)  # type: ignore[arg-type]
        return self._leave(stream, self.norm)

    def logits(self, hidden: Tensor) -> Tensor:
        """[...,V] in the head's type, which may be wider than that of the layers."""
        return linear(hidden.to(self.head_weight.dtype), self.head_weight)

    @property
    def head_weight(self) -> Tensor:
        """[V,D], the embedding itself where they are tied."""
        return self.embed if self.head is None else self.head

    def mtp_hidden(
        self,
        hidden: Tensor,
        tokens: Tensor,
        positions: Tensor | None = None,
        routing: Routing | None = None,
        recompute: bool = False,
    ) -> list[Tensor]:
        """One [B,T,D] per MTP module; entry k-1 at index i predicts token i+k+1 of its document.

        At a document's last k tokens the shifted embedding belongs to the next document (or to
        padding): these outputs are meaningless and must carry no loss.
        """
        layout = self._layout(tokens, positions, False, None)
        outputs = []
        for k, module in enumerate(self.mtp, start=1):
            shifted = F.pad(tokens[:, k:], (0, k))
            pair = torch.cat((module.embed_norm(self.embed[shifted]), module.hidden_norm(hidden)), -1)  # type: ignore[operator]
            stream = self._enter(module.eh_proj(pair))  # type: ignore[operator]
            stream = run_layer(module.layer, stream, layout, None, routing, recompute)  # type: ignore[arg-type]
            hidden = self._leave(stream, module.norm)  # type: ignore[arg-type]
            outputs.append(hidden)
        return outputs

    def mtp_step(self, hidden: Tensor, following: Tensor, positions: Tensor, cache: LayerCache, span: int) -> Tensor:
        """The first MTP module with a cache, for speculation: hidden [B,T,D] at positions [B,T], the token that
        follows each -> [B,T,D], whose logits are of the token after that."""
        module = self.mtp[0]
        layout = self._layout(following, positions, True, span)
        pair = torch.cat((module.embed_norm(self.embed[following]), module.hidden_norm(hidden)), -1)  # type: ignore[operator]
        stream = self._enter(module.eh_proj(pair))  # type: ignore[operator]
        return self._leave(module.layer(stream, layout, cache, None), module.norm)  # type: ignore[operator,arg-type]

    def _layout(self, tokens: Tensor, positions: Tensor | None, cached: bool, span: int | None) -> Layout:
        batch, length = tokens.shape
        if cached and positions is None:
            positions = torch.arange(length, device=tokens.device).expand(batch, -1)
        if cached and span is None:
            assert positions is not None
            span = int(positions.max()) + 1
        return Layout(positions, batch, length, tokens.device, span if cached else None)

    def _enter(self, x: Tensor) -> Stream:
        return x, (self.residual.gamma * x if isinstance(self.residual, DualResidual) else x.new_empty(0))

    def _leave(self, stream: Stream, norm: Part) -> Tensor:
        x, r = stream
        return x + norm(r) if isinstance(self.residual, DualResidual) else norm(x)

    # --- memory ---------------------------------------------------------------------------------
    def new_caches(
        self, rows: int, slots: int, dtype: torch.dtype | None = None, device: torch.device | None = None
    ) -> list[LayerCache]:
        """One cache a layer for `rows` sequences of at most `slots` tokens."""
        dtype, device = dtype or self.embed.dtype, device or self.embed.device
        return [layer.mixer.new_cache(rows, slots, dtype, device) for layer in self.layers]  # type: ignore[operator,union-attr]

    # --- training's view ------------------------------------------------------------------------
    def optimizer_groups(self) -> dict[str, dict[str, nn.Parameter]]:
        """ "matrices" (Muon: the last two dimensions are a matrix, leading ones a batch) and "others".

        Embedding and head are tables, a router's rows are expert centroids, a convolution is a filter a
        channel: AdamW, like the vectors and LoRA's factors. What is frozen is in neither.
        """
        groups: dict[str, dict[str, nn.Parameter]] = {"matrices": {}, "others": {}}
        for name, p in self.named_parameters():
            table = name in ("embed", "head") or name.endswith((".router", ".shared_gate", ".conv")) or ".lora." in name
            if p.requires_grad:
                groups["others" if table or p.ndim < 2 else "matrices"][name] = p
        return groups

    @torch.no_grad()
    def update_router_bias(self, loads: Sequence[Tensor]) -> None:
        """loads: one [E] a MoE layer, as a forward pass recorded them (MTP modules last)."""
        routers = [m for m in self.modules() if isinstance(m, MoEFFN)]
        for router, load in zip(routers, loads, strict=True):
            router.update_bias(load)


@torch.no_grad()
def init_weights(model: Transformer, seed: int) -> None:
    """Every weight of the model, in one place and from one seed.

    Matrices are uniform with variance 1/fan_in; matrices that write to the residual stream start at
    zero, so a new model is its embedding (as in modded-nanogpt); norms are 1, router biases 0. A tied
    table has variance 1/D so that first logits are of order 1; an untied one 1, with a small head.
    A delta rule's rates are drawn as Mamba-2's: A in 1..16, a step of 0.001 to 0.1 before training.
    """
    generator = torch.Generator().manual_seed(seed)
    centred = {id(m.weight) for m in model.modules() if isinstance(m, RMSNorm) and m.centred}
    for name, p in model.named_parameters():
        leaf = name.rsplit(".", 2)[-2:]
        if name.endswith(".A_log"):
            p.uniform_(1.0, 16.0, generator=generator).log_()
        elif name.endswith(".dt_bias"):
            step = p.uniform_(math.log(1e-3), math.log(0.1), generator=generator).exp()
            p.copy_(step + torch.log(-torch.expm1(-step)))  # softplus of it is the step
        elif p.ndim == 1:
            p.fill_(0.0 if name.endswith(".bias") or id(p) in centred else 1.0)
        elif name == "embed":
            p.normal_(0.0, 1.0 if model.head is not None else model.spec.d_model**-0.5, generator=generator)
        elif name == "head":
            p.normal_(0.0, 0.02 * model.spec.d_model**-0.5, generator=generator)
        elif "o_proj" in leaf or "down" in leaf:
            p.zero_()
        else:
            bound = (3.0 / p.shape[-1]) ** 0.5
            p.uniform_(-bound, bound, generator=generator)
