"""Norms, rotary positions, windows, residual styles and multi-token prediction against plain transcriptions."""

from __future__ import annotations

import cmath
import math

import pytest
import torch
from torch import Tensor

from test_model_zoo import D, gap, next_token_loss, noisy, spec_of, tokens_of
from trivet.model import Transformer, attention
from trivet.model.attention import _products, attend
from trivet.model.layers import (
    Layout,
    RMSNorm,
    added,
    apply_rope,
    inverse_frequencies,
    rotation_amplitude,
    yarn_temperature,
)
from trivet.spec import Rope, Yarn


def rms(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def test_rms_norm_is_its_equation() -> None:
    norm = RMSNorm(D, 0.3)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(3, D)
    assert gap(norm(x), rms(x, norm.weight, 0.3)) < 1e-6 and gap(norm(x), rms(x, norm.weight, 0.2)) > 1e-3


@pytest.mark.parametrize("interleaved", [True, False])
def test_rope_turns_each_pair_as_a_complex_number(interleaved: bool) -> None:
    rope = Rope(dims=6, theta=50.0, interleaved=interleaved)
    positions = torch.tensor([[0, 1, 7, 30]])
    x = torch.randn(1, 4, 1, 6)
    got = apply_rope(x, Layout(positions, 1, 4, x.device).rotation(rope), interleaved)
    for t, p in enumerate(positions[0].tolist()):
        for i in range(3):
            at = (2 * i, 2 * i + 1) if interleaved else (i, i + 3)
            z = complex(*(float(x[0, t, 0, j]) for j in at)) * cmath.exp(1j * p * 50.0 ** (-2 * i / 6))
            assert [float(got[0, t, 0, j]) for j in at] == pytest.approx([z.real, z.imag], abs=1e-5)


YARNS = [
    Yarn(factor=40, original_length=4096, mscale=0.707, mscale_all_dim=0.707),
    Yarn(factor=40, original_length=4096, mscale=1.0, mscale_all_dim=1.0),
    Yarn(factor=4, original_length=32768),
    Yarn(factor=8, original_length=64, beta_fast=4.0, beta_slow=1.5, mscale=0.9, mscale_all_dim=0.4),
]


@pytest.mark.parametrize("yarn", YARNS, ids=lambda y: f"x{y.factor:g} from {y.original_length}")
@pytest.mark.parametrize(("dims", "theta"), [(64, 10000.0), (128, 1e6), (8, 100.0)])
def test_yarn_equals_transformers(yarn: Yarn, dims: int, theta: float) -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = {
        "rope_type": "yarn", "rope_theta": theta, "factor": yarn.factor, "beta_fast": yarn.beta_fast,
        "original_max_position_embeddings": yarn.original_length, "beta_slow": yarn.beta_slow,
    }  # fmt: skip
    if yarn.mscale_all_dim:
        parameters |= {"mscale": yarn.mscale, "mscale_all_dim": yarn.mscale_all_dim}
    config = transformers.Qwen3Config(
        head_dim=dims, hidden_size=dims, num_attention_heads=1, rope_parameters=parameters,
        max_position_embeddings=int(yarn.factor * yarn.original_length),
    )  # fmt: skip
    want, amplitude = ROPE_INIT_FUNCTIONS["yarn"](config, torch.device("cpu"))
    rope = Rope(dims=dims, theta=theta, yarn=yarn)
    assert torch.allclose(inverse_frequencies(rope), want, rtol=1e-5, atol=0)
    assert rotation_amplitude(rope) == pytest.approx(amplitude, rel=1e-6)
    if dims > 8:  # (a theta of 100 never gets slow enough for a length of 32768 to matter)
        plain = inverse_frequencies(Rope(dims=dims, theta=theta))
        assert not torch.allclose(plain, want, rtol=1e-3, atol=0)


def test_temperatures_of_the_released_deepseeks() -> None:
    assert yarn_temperature(YARNS[0], 0.707) ** 2 == pytest.approx(1.58962, rel=1e-5)
    assert yarn_temperature(YARNS[1], 1.0) ** 2 == pytest.approx(1.87385, rel=1e-5)
    assert rotation_amplitude(Rope(dims=64, yarn=YARNS[0])) == 1.0
    assert rotation_amplitude(Rope(dims=64, yarn=YARNS[2])) == pytest.approx(0.1 * math.log(4) + 1)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)], ids=str)
@pytest.mark.parametrize("widths", [(8, 8), (10, 7)], ids=str)
def test_attend_is_softmax_attention(
    heads: tuple[int, int], widths: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of queries, one query (the folded form) and plain causal rows, against a loop over heads."""
    (h, k_heads), (kd, vd) = heads, widths
    q, k, v = torch.randn(2, h, 5, kd), torch.randn(2, k_heads, 5, kd), torch.randn(2, k_heads, 5, vd)
    causal = torch.ones(5, 5, dtype=torch.bool).tril().expand(2, 1, 5, 5)

    def plain(mask: Tensor) -> Tensor:
        rows = []
        for i in range(h):
            j = i // (h // k_heads)
            score = (q[:, i] @ k[:, j].mT * 0.3).masked_fill(~mask[:, 0], -math.inf)
            rows.append(score.softmax(-1) @ v[:, j])
        return torch.stack(rows, 1)

    want, mask = plain(causal), added(causal, torch.float32)
    assert gap(attend(q, k, v, None, 0.3), want) < 1e-5
    assert gap(attend(q, k, v, mask, 0.3), want) < 1e-5
    assert gap(attend(q[:, :, 3:4], k, v, mask[:, :, 3:4], 0.3), want[:, :, 3:4]) < 1e-5
    assert gap(attend(q[:, :, 3:4], k, v, mask[:, :, 2:3], 0.3), want[:, :, 3:4]) > 1e-3
    for piece, block in ((2**20, 128), (30, 2), (30, 5)):  # all at once, and some pairs or queries at a time
        monkeypatch.setattr(attention, "PIECE", piece)
        monkeypatch.setattr(attention, "BLOCK", {torch.float32: block})
        assert gap(_products(q, k, v, None, 0.3), want) < 1e-5
        assert gap(_products(q, k, v, mask, 0.3), want) < 1e-5
        assert gap(_products(q[:, :, 3:4], k, v, mask[:, :, 3:4], 0.3), want[:, :, 3:4]) < 1e-5
        assert gap(_products(q[:, :, 3:4], k, v, mask[:, :, 2:3], 0.3), want[:, :, 3:4]) > 1e-3


def test_a_window_sees_itself_and_what_is_just_before() -> None:
    model, tokens = noisy(spec_of("window/dense")), tokens_of(1, 12)
    before = model(tokens)
    for changed in range(12):
        other = tokens.clone()
        other[0, changed] = (other[0, changed] + 1) % 37
        moved = ((model(other) - before).abs().amax(-1) > 1e-6)[0].nonzero().flatten().tolist()
        assert moved == list(range(changed, min(changed + 5, 12)))


# ------------------------------------------------------------------------------------ residual styles
def parts(model: Transformer, layer: int, x: Tensor) -> tuple:
    block, layout = model.layers[layer], Layout(None, len(x), x.shape[1], x.device)
    return block, lambda h: block.mixer(h, layout), lambda h: block.ffn(h, layout)


def test_pre_norm_is_its_equation() -> None:
    model, tokens = noisy(spec_of("gqa/dense lightning/moe")), tokens_of(2, 9)
    x = model.embed[tokens]
    for i in range(2):
        block, mixer, ffn = parts(model, i, x)
        x = x + mixer(rms(x, block.mixer_norm.weight))
        x = x + ffn(rms(x, block.ffn_norm.weight))
    assert gap(model(tokens), rms(x, model.norm.weight)) < 1e-5


def test_post_norm_is_minimax_layer() -> None:
    """The residual is the normed stream, each side with its own factors."""
    model, tokens = noisy(spec_of("gqa/dense/post lightning/moe/post")), tokens_of(2, 9)

    def forward(alphas: tuple[float, float], betas: tuple[float, float]) -> Tensor:
        x = model.embed[tokens]
        for i in range(2):
            block, mixer, ffn = parts(model, i, x)
            h = rms(x, block.mixer_norm.weight)
            x = alphas[0] * h + betas[0] * mixer(h)
            h = rms(x, block.ffn_norm.weight)
            x = alphas[1] * h + betas[1] * ffn(h)
        return rms(x, model.norm.weight)

    got = model(tokens)
    assert gap(got, forward((1.3, 1.2), (0.8, 0.9))) < 1e-5
    assert gap(got, forward((1.2, 1.3), (0.8, 0.9))) > 1e-3  # mixer's and ffn's factors exchanged
    assert gap(got, forward((1.3, 1.2), (0.9, 0.8))) > 1e-3


def test_dual_residual_is_the_published_algorithm() -> None:
    """arXiv 2304.14802: r_0 = gamma x_0; r += gamma f; x = norm(x + f); output x_N + norm(r_N)."""
    model, tokens = noisy(spec_of("gqa/dense/dual lightning/moe/dual")), tokens_of(2, 9)

    def forward(gamma: float) -> Tensor:
        x = model.embed[tokens]
        r = gamma * x
        for i in range(2):
            block, mixer, ffn = parts(model, i, x)
            for part, norm in ((mixer, block.mixer_norm), (ffn, block.ffn_norm)):
                f = part(x)
                r = r + gamma * f
                x = rms(x + f, norm.weight)
        return x + rms(r, model.norm.weight)

    assert gap(model(tokens), forward(0.6)) < 1e-5
    # The final norm divides a common gamma out again: only eps sees it. An uneven one would show.
    assert gap(model(tokens), forward(0.0)) > 1e-2


# ------------------------------------------------------------------------------ multi-token prediction
def mtp_as_published(model: Transformer, hidden: Tensor, tokens: Tensor) -> list[Tensor]:
    """h'_i^k = M_k [norm emb(t_(i+k)) ; norm h_i^(k-1)] for the i that have a t_(i+k), then a layer."""
    outs = []
    for k, module in enumerate(model.mtp, start=1):
        kept = tokens.shape[1] - k
        ahead = rms(model.embed[tokens[:, k:]], module.embed_norm.weight)
        behind = rms(hidden[:, :kept], module.hidden_norm.weight)
        x = torch.cat((ahead, behind), -1) @ module.eh_proj.weight.T
        layout = Layout(None, len(x), kept, x.device)
        x = x + module.layer.mixer(rms(x, module.layer.mixer_norm.weight), layout)
        x = x + module.layer.ffn(rms(x, module.layer.ffn_norm.weight), layout)
        hidden = rms(x, module.norm.weight)
        outs.append(hidden)
    return outs


@pytest.mark.parametrize("pattern", ["gqa/dense", "mla/moe*2", "lightning/moe"])
def test_mtp_is_the_published_equation(pattern: str) -> None:
    model, tokens = noisy(spec_of(pattern, mtp=2)), tokens_of(2, 11)
    hidden = model(tokens)
    got = model.mtp_hidden(hidden, tokens)
    want = mtp_as_published(model, hidden, tokens)
    assert len(got) == len(want) == 2
    for k, (a, b) in enumerate(zip(got, want, strict=True), start=1):
        assert gap(a[:, : 11 - k], b) < 1e-5
    swapped = noisy(spec_of(pattern, mtp=2))
    with torch.no_grad():  # hidden first, as the paper prints it, is another model
        swapped.mtp[0].eh_proj.weight.copy_(model.mtp[0].eh_proj.weight.roll(D, 1))
    assert gap(swapped.mtp_hidden(hidden, tokens)[0][:, :10], want[0]) > 1e-2


def test_entry_k_minus_1_at_i_knows_tokens_up_to_i_plus_k() -> None:
    """So that it may predict token i+k+1, and token i+k+1 is the first that it has not seen."""
    model, tokens = noisy(spec_of("gqa/dense lightning/dense", mtp=3)), tokens_of(1, 12)
    base = model.mtp_hidden(model(tokens), tokens)
    for at in range(12):
        other = tokens.clone()
        other[0, at] = (other[0, at] + 1) % 37
        changed = model.mtp_hidden(model(other), other)
        for k, (a, b) in enumerate(zip(changed, base, strict=True), start=1):
            moved = ((a - b).abs().amax(-1) > 1e-6)[0, : 12 - k].nonzero().flatten().tolist()
            assert moved == list(range(max(at - k, 0), 12 - k))


def test_mtp_keeps_packed_documents_apart() -> None:
    model, tokens = noisy(spec_of("mla/dense lightning/moe", mtp=1)), tokens_of(1, 13)
    positions = torch.cat((torch.arange(5), torch.arange(8)))[None]
    packed = model.mtp_hidden(model(tokens, positions), tokens, positions)[0]
    for part in (slice(0, 5), slice(5, 13)):
        alone = model.mtp_hidden(model(tokens[:, part]), tokens[:, part])[0]
        assert gap(packed[:, part][:, :-1], alone[:, :-1]) < 1e-5
    leaky = model.mtp_hidden(model(tokens), tokens)[0]
    assert gap(leaky[:, 5:12], packed[:, 5:12]) > 1e-2


def test_mtp_leaves_the_main_model_alone() -> None:
    with_mtp, tokens = noisy(spec_of("gqa/moe", mtp=1)), tokens_of(2, 8)
    without = Transformer(spec_of("gqa/moe"))
    without.load_state_dict({k: v for k, v in with_mtp.state_dict().items() if not k.startswith("mtp.")})
    assert torch.equal(with_mtp(tokens), without(tokens)) and without.mtp_hidden(without(tokens), tokens) == []
    next_token_loss(with_mtp, tokens).backward()
    assert all(p.grad is None for p in with_mtp.mtp.parameters())


# ---------------------------------------------------------------------------------------- other views
def test_optimizer_groups_name_every_parameter_once() -> None:
    model = Transformer(spec_of("mla_q/moe lightning/dense mqa/dense", mtp=1, tied=False))
    groups = model.optimizer_groups()
    named = groups["matrices"] | groups["others"]
    assert named.keys() == dict(model.named_parameters()).keys()
    assert len(named) == len(groups["matrices"]) + len(groups["others"])
    others = {n for n in groups["others"] if groups["others"][n].ndim >= 2}
    assert others == {"embed", "head", "layers.0.ffn.router", "mtp.0.layer.ffn.router"} & named.keys()
    assert all(p.ndim >= 2 for p in groups["matrices"].values())
    assert "layers.0.ffn.gate_up" in groups["matrices"] and "mtp.0.eh_proj.weight" in groups["matrices"]


def test_tied_and_untied_heads() -> None:
    tied, untied = noisy(spec_of("gqa/dense")), noisy(spec_of("gqa/dense", tied=False))
    hidden = torch.randn(2, D)
    assert gap(tied.logits(hidden), hidden @ tied.embed.T) < 1e-6
    assert untied.head is not None and gap(untied.logits(hidden), hidden @ untied.head.T) < 1e-6
    assert tied.head_weight is tied.embed and untied.head_weight is untied.head
