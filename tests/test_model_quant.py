"""Small weights against the matrices that they stand for, and against the model that they came from."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from test_engine_generate import CHAT
from test_model_zoo import PATTERNS, noisy, spec_of
from trivet.config import UserError
from trivet.engine import Engine, Request
from trivet.messages import Sampling
from trivet.model import Transformer
from trivet.model.ffn import MoEFFN, sorted_
from trivet.model.quant import GROUP, QuantExperts, QuantLinear, int4_weights, int8_weights, quantise
from trivet.spec import GQA, MLA, ModelSpec, MoE, Rope, SwiGLU


def weights(rows: int = 48, columns: int = 64, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).to(dtype)


def big(dtype: torch.dtype = torch.bfloat16) -> Transformer:
    """Wide enough for int4's groups, with a shared expert, latent attention and biases."""
    rope = Rope(dims=16)
    spec = ModelSpec(
        vocab_size=CHAT.vocab_size, d_model=64, pattern="gqa/dense mla/moe", tie_embeddings=False, context_length=96,
        mixers={"gqa": GQA(heads=4, kv_heads=2, head_dim=16, rope=rope, qkv_bias=True),
                "mla": MLA(heads=4, kv_rank=32, nope_dim=16, v_dim=16, rope=rope)},
        ffns={"dense": SwiGLU(hidden=96), "moe": MoE(experts=4, top_k=2, hidden=32, shared_hidden=64)},
    )  # fmt: skip
    return noisy(spec).to(dtype).eval()


def test_int8_is_within_half_a_step_of_each_row() -> None:
    w = weights()
    q, scale = int8_weights(w)
    assert q.dtype == torch.int8 and (q.abs().amax(1) == 127).all()
    assert ((q * scale[:, None] - w).abs() <= scale[:, None] / 2 + 1e-6).all()


def test_int4_is_within_half_a_step_of_each_group() -> None:
    w = weights()
    q, scale, zero = int4_weights(w)
    back = (q.unflatten(-1, (-1, GROUP)) - 8) * scale[..., None] + zero[..., None]
    assert q.min() == 0 and q.max() == 15
    assert ((back - w.unflatten(-1, (-1, GROUP))).abs() <= scale[..., None] / 2 + 1e-6).all()


@pytest.mark.parametrize("bits", ["int8", "int4"])
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_packed_products_are_those_of_the_dequantised_matrix(bits: str, rows: int) -> None:
    dtype = torch.float32 if bits == "int8" else torch.bfloat16
    w, x = weights(dtype=dtype), torch.randn(2, rows, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    layer = QuantLinear(w, None, bits)  # type: ignore[arg-type]
    if bits == "int8":
        matrix = layer.dequantised()
    else:
        q, scale, zero = int4_weights(w)
        matrix = ((q.unflatten(-1, (-1, GROUP)) - 8) * scale.float()[..., None] + zero.float()[..., None]).flatten(-2)
    want = F.linear(x.float(), matrix.float())
    limit = 1e-4 if bits == "int8" else 0.02 * float(want.abs().max())
    assert (layer(x).float() - want).abs().max() < limit
    assert (layer(x).float() - F.linear(x.float(), matrix.float().roll(1, 0))).abs().max() > 10 * limit  # the twin


@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_a_quantised_model_is_smaller_and_close(bits: str) -> None:
    model, other, small = big(), big(), big()
    tokens = torch.randint(20, CHAT.vocab_size, (4, 40), generator=torch.Generator().manual_seed(2))
    before, after, left = quantise(small, bits)  # type: ignore[arg-type]
    with torch.no_grad():
        for p in other.parameters():  # a model whose matrices are off by as much as 20%
            if p.ndim > 1:
                p.mul_(1 + 0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(3)).to(p))
        want, got, off = (m.logits(m(tokens)).float().log_softmax(-1) for m in (model, small, other))
    kl = lambda p: float((want.exp() * (want - p)).sum(-1).mean())  # noqa: E731
    assert left == 0 and after < before and 0 < kl(got) < {"int8": 0.02, "int4": 0.2}[bits] * kl(off)
    names = dict(small.named_modules())
    assert isinstance(names["layers.1.mixer.o_proj"], QuantLinear)
    assert not isinstance(names["layers.1.mixer.kv_up"], QuantLinear)
    assert isinstance(names["layers.1.ffn.experts"], QuantExperts) and "layers.1.ffn.gate_up" not in dict(
        small.named_parameters()
    )


def test_small_experts_are_the_loop_over_tokens_with_dequantised_matrices() -> None:
    moe = big(torch.float32).layers[1].ffn
    assert isinstance(moe, MoEFFN)
    g = torch.Generator().manual_seed(4)
    x, gates = torch.randn(9, 64, generator=g), torch.rand(9, 2, generator=g)
    chosen = torch.rand(9, 4, generator=g).topk(2).indices
    small = QuantExperts(moe, "int8")
    want = torch.zeros(9, 64)
    for n in range(9):
        for gate, e in zip(gates[n], chosen[n].tolist(), strict=True):
            up, down = small.each[e].gate_up.dequantised(), small.each[e].down.dequantised()  # type: ignore[union-attr,operator]
            h = up @ x[n]
            want[n] += gate * (down @ (F.silu(h[:32]) * h[32:]))
    torch.testing.assert_close(small(x, chosen, gates), want, atol=1e-4, rtol=1e-4)
    assert (small(x, chosen.roll(1, 0), gates) - want).abs().max() > 0.01
    exact = sorted_(x, chosen, gates, moe.gate_up, moe.down)
    assert 0 < (want - exact).norm() < 0.02 * exact.norm()


def test_what_does_not_fit_stays_and_is_counted() -> None:
    model = noisy(spec_of(PATTERNS["mla"])).bfloat16()
    before, after, left = quantise(model, "int4")
    assert left > 0 and not any(isinstance(m, QuantLinear) for m in model.modules()) and after == before


def test_int4_wants_bf16() -> None:
    model = noisy(spec_of(PATTERNS["mla"]))
    with pytest.raises(UserError, match="bf16 only"):
        quantise(model, "int4")


def test_a_quantised_model_generates() -> None:
    model = big(torch.float32)
    quantise(model, "int8")
    asked = [Request(tuple(range(20, 30)), Sampling(temperature=0.0, max_tokens=12, thinking="off"))]
    (done,) = Engine(model, CHAT, 1, 96).generate(asked)
    with torch.no_grad():
        logits = model.logits(model(torch.tensor([[*range(20, 30), *done.tokens]])))[0, 9:-1]
    assert logits.argmax(-1).tolist()[:4] == list(done.tokens)[:4]
