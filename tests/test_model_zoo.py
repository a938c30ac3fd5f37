"""One small spec of everything, and what must hold for each: counts, bytes, init, bf16.

The other model tests take their specs from here. Weights are never left as initialised: output
projections start at zero, so a fresh model would pass any equality test.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trivet.config import UserError
from trivet.model import Routing, Transformer, ffn
from trivet.model.ffn import MoEFFN
from trivet.spec import (
    FFN,
    GQA,
    MLA,
    DualChunks,
    DualResidual,
    GatedDeltaNet,
    Lightning,
    Mixer,
    ModelSpec,
    MoE,
    PostNorm,
    PreNorm,
    Residual,
    Rope,
    SwiGLU,
    Yarn,
)

VOCAB, D = 37, 24
ROPE = Rope(dims=8, theta=100.0)
YARN = Yarn(factor=4, original_length=16, beta_fast=4.0, mscale=0.7, mscale_all_dim=0.9)

MIXERS: dict[str, Mixer] = {
    "gqa": GQA(heads=4, kv_heads=2, head_dim=8, rope=ROPE),
    "mha": GQA(heads=3, kv_heads=3, head_dim=8, rope=Rope(dims=8, interleaved=True)),
    "mqa": GQA(heads=4, kv_heads=1, head_dim=8, rope=ROPE, qkv_bias=True),
    "qk_norm": GQA(heads=4, kv_heads=2, head_dim=8, rope=ROPE, qk_norm=True),
    "partial": GQA(heads=4, kv_heads=2, head_dim=8, rope=Rope(dims=4, theta=100.0)),
    "nope": GQA(heads=4, kv_heads=2, head_dim=8, rope=Rope(dims=0)),
    "window": GQA(heads=4, kv_heads=2, head_dim=8, rope=ROPE, window=5),
    "joint_norm": GQA(heads=4, kv_heads=2, head_dim=8, rope=ROPE, qk_norm=True, qk_norm_over="all"),
    "out_gate": GQA(heads=4, kv_heads=2, head_dim=8, rope=Rope(dims=2, theta=100.0), qk_norm=True, out_gate=True),
    "chunks": GQA(heads=4, kv_heads=2, head_dim=8, rope=Rope(dims=4, theta=100.0), qk_norm=True,
                  chunks=DualChunks(chunk_size=7, local_size=3, original_length=6)),
    "mla": MLA(heads=3, kv_rank=10, nope_dim=6, v_dim=7, rope=Rope(dims=4, interleaved=True)),
    "mla_q": MLA(heads=3, kv_rank=10, q_rank=9, nope_dim=6, v_dim=12, rope=Rope(dims=4, yarn=YARN)),
    "lightning": Lightning(heads=3, head_dim=8),
    "delta": GatedDeltaNet(heads=4, key_heads=2, key_dim=8, value_dim=6),
}  # fmt: skip
FFNS: dict[str, FFN] = {
    "dense": SwiGLU(hidden=40),
    "moe": MoE(experts=6, top_k=2, hidden=16, shared_hidden=8, scale=1.5, balance=0.01),
    "grouped": MoE(experts=8, top_k=3, hidden=16, groups=4, top_groups=2, score="softmax", norm_topk=False,
                   group_score="max", selection_bias=False, balance=0.01),
    "gated": MoE(experts=6, top_k=2, hidden=16, shared_hidden=8, shared_gate=True, score="softmax", norm_topk=False,
                 selection_bias=False),
}  # fmt: skip
RESIDUALS: dict[str, Residual] = {
    "pre": PreNorm(),
    "post": PostNorm(mixer_alpha=1.3, mixer_beta=0.8, ffn_alpha=1.2, ffn_beta=0.9),
    "dual": DualResidual(gamma=0.6),
}
PATTERNS = {name: f"{name}/dense {name}/moe" for name in MIXERS} | {
    "post": "lightning/moe/post gqa/dense/post mla/dense/post",
    "dual": "gqa/dense/dual lightning/moe/dual mla_q/dense/dual",
    "hybrid": "(lightning/moe*2 window/grouped)*2 mla/dense",
    "gated": "gqa/gated*2",
    "next": "delta/gated out_gate/gated",
}


def spec_of(pattern: str, mtp: int = 0, tied: bool = True) -> ModelSpec:
    return ModelSpec(
        vocab_size=VOCAB, d_model=D, pattern=pattern, mixers=MIXERS, ffns=FFNS, residuals=RESIDUALS,
        mtp=mtp, tie_embeddings=tied,
    )  # fmt: skip


def noisy(spec: ModelSpec, seed: int = 0, std: float = 0.15) -> Transformer:
    """A model in which every number takes part in the output."""
    model = Transformer(spec, seed=seed)
    g = torch.Generator().manual_seed(seed + 100)
    with torch.no_grad():
        for p in model.parameters():
            p += torch.randn(p.shape, generator=g) * std
        for module in model.modules():
            if isinstance(module, MoEFFN) and module.spec.selection_bias:
                module.bias += torch.randn(module.bias.shape, generator=g) * std
    return model


def tokens_of(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def gap(a: Tensor, b: Tensor) -> float:
    """Largest difference, relative to the largest number."""
    assert a.shape == b.shape
    a, b = a.detach(), b.detach()
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-30))


def next_token_loss(model: Transformer, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
    """Plain summed cross entropy within each document, for tests."""
    logits = model.logits(model(tokens, positions))[:, :-1]
    if positions is None:
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    has_target = positions[:, 1:] > 0  # the next token continues this token's document
    return F.cross_entropy(logits[has_target], tokens[:, 1:][has_target], reduction="sum")


# --------------------------------------------------------------------------------------------- tests
def count(model: Transformer) -> int:
    return sum(t.numel() for t in model.state_dict().values())


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("mtp", [0, 2])
def test_arithmetic_on_the_spec_counts_the_tensors(name: str, tied: bool, mtp: int) -> None:
    spec = spec_of(PATTERNS[name], mtp, tied)
    assert spec.num_params() == count(Transformer(spec))


def test_the_count_notices_one_number_more() -> None:
    spec = spec_of("gqa/moe mla_q/dense")
    wider = spec.model_copy(update={"mixers": MIXERS | {"mla_q": MIXERS["mla_q"].model_copy(update={"kv_rank": 11})}})
    assert spec.num_params() != count(Transformer(wider)) == wider.num_params()


@pytest.mark.parametrize("name", PATTERNS)
def test_cache_bytes_per_slot_and_row_are_as_priced(name: str) -> None:
    """Bytes grow by the spec's price with each slot; beyond it a row has its state and one spare slot."""
    spec = spec_of(PATTERNS[name])
    model = Transformer(spec)

    def nbytes(rows: int, slots: int) -> int:
        return sum(c.nbytes for c in model.new_caches(rows, slots, dtype=torch.bfloat16))

    slot = spec.cache_bytes_per_token(2)
    assert nbytes(2, 18) - nbytes(2, 17) == 2 * slot
    assert nbytes(3, 17) == 3 * (spec.state_bytes(4) + (17 + 1) * slot)


@pytest.mark.parametrize(
    "wider", [{"gqa": {"head_dim": 10}}, {"mla": {"kv_rank": 11}}, {"lightning": {"heads": 4}}, {"delta": {"conv": 5}}]
)
def test_the_bytes_notice_a_wider_cache(wider: dict[str, dict[str, int]]) -> None:
    """The twin: another mixer's tensors are not this spec's bytes."""
    spec = spec_of("gqa/dense mla/dense lightning/dense delta/dense")
    mixers = MIXERS | {name: MIXERS[name].model_copy(update=change) for name, change in wider.items()}
    caches = Transformer(spec.model_copy(update={"mixers": mixers})).new_caches(1, 16, dtype=torch.bfloat16)
    assert sum(c.nbytes for c in caches) > spec.state_bytes(4) + 17 * spec.cache_bytes_per_token(2)


def test_active_params_are_what_one_token_meets() -> None:
    """With one token the gradient is non-zero in its own experts only."""
    spec = spec_of("gqa/moe mla/grouped", tied=False)
    model = noisy(spec)
    model.logits(model(tokens_of(1, 1))).square().sum().backward()
    idle = 0
    for name, p in model.named_parameters():
        if name.endswith(("ffn.gate_up", "ffn.down")) and p.ndim > 2 and len(p) > 2:
            idle += sum(e.numel() for e, g in zip(p, p.grad, strict=True) if not g.any())  # type: ignore[arg-type]
    assert spec.num_params() - idle == spec.active_params()


def test_init_is_a_function_of_the_seed() -> None:
    spec = spec_of(PATTERNS["hybrid"], mtp=1, tied=False)
    torch.manual_seed(5)
    a = Transformer(spec, seed=3).state_dict()
    torch.manual_seed(6)  # the global generator must not matter
    b, c = Transformer(spec, seed=3).state_dict(), Transformer(spec, seed=4).state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a)
    random = [k for k in a if a[k].unique().numel() > 1]
    assert "embed" in random and "head" in random and len(random) > 20
    assert not any(torch.equal(a[k], c[k]) for k in random)


def test_a_new_model_is_its_embedding() -> None:
    spec = spec_of("gqa/dense lightning/moe")
    model, tokens = Transformer(spec), tokens_of(2, 9)
    assert gap(model(tokens), model.norm(model.embed[tokens])) < 1e-6
    assert gap(noisy(spec)(tokens), model.norm(model.embed[tokens])) > 0.1  # the twin


@pytest.mark.parametrize("name", PATTERNS)
def test_bf16_forward_and_backward_are_finite_and_close(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Routing is replayed: a rounded affinity may choose another expert, and rightly so."""
    monkeypatch.setattr(ffn, "NEEDLESS", {})  # the form that training takes
    spec, tokens = spec_of(PATTERNS[name]), tokens_of(2, 33)
    exact, rounded = noisy(spec, std=0.08), noisy(spec, std=0.08).to(torch.bfloat16)
    routing = Routing()
    want = exact.logits(exact(tokens, routing=routing))
    got = rounded.logits(rounded(tokens, routing=Routing(replay=routing.experts)))
    assert got.dtype == torch.bfloat16
    assert (got.float() - want).norm() < 0.05 * want.norm()
    direction = torch.randn(want.shape, generator=torch.Generator().manual_seed(1))
    (want * direction).sum().backward()
    (got * direction).sum().backward()
    for (key, a), b in zip(exact.named_parameters(), rounded.parameters(), strict=True):
        if a.grad is None:
            continue
        assert b.grad is not None and torch.isfinite(b.grad).all(), key
        cosine = F.cosine_similarity(a.grad.flatten(), b.grad.float().flatten(), dim=0)
        # A norm a head enlarges what rounding did to an output that is almost zero (see test_model_delta.py).
        assert cosine > (0.8 if "delta" in PATTERNS[name] else 0.98), (key, float(cosine))


@pytest.mark.parametrize("width", [{"hidden": 12}, {"hidden": 16, "experts": 4}])
def test_widths_that_grouped_products_cannot_take_are_refused(width: dict[str, int]) -> None:
    experts = MoE(**{"experts": 6, "top_k": 2} | width)
    d = D if width["hidden"] % 8 else D + 4
    spec = spec_of("gqa/moe").model_copy(update={"d_model": d, "ffns": FFNS | {"moe": experts}})
    with pytest.raises(UserError, match="multiples of 8"):
        Transformer(spec)


def test_decay_rates_and_routing_biases_stay_fp32_in_a_bf16_model() -> None:
    spec = spec_of("lightning/moe*3 gqa/dense")
    exact, rounded = noisy(spec), noisy(spec).to(torch.bfloat16)
    assert rounded.layers[0].ffn.gate_up.dtype == torch.bfloat16
    for a, b in zip(exact.buffers(), rounded.buffers(), strict=True):
        assert b.dtype == torch.float32 and torch.equal(a, b)
    slopes = exact.layers[0].mixer.slopes
    assert gap(slopes.bfloat16().float().neg().exp(), slopes.neg().exp()) > 1e-5  # rounding would have told
