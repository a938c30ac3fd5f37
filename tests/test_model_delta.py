"""Gated DeltaNet: recurrent == chunked == the paper's recurrence == transformers' form, gradients too, across calls."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from test_model_zoo import MIXERS, gap, noisy, spec_of, tokens_of
from trivet.model import Transformer, delta
from trivet.model.delta import CHUNK, chunked, recurrent, short_conv
from trivet.model.layers import Layout
from trivet.spec import GatedDeltaNet

HEADS, KEY, VALUE = 3, 5, 4
LENGTHS = [1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 37]
Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def inputs(batch: int, length: int, seed: int = 0) -> Inputs:
    """q, k of unit length, v, log decays from almost none to almost all, write strengths."""
    g = torch.Generator().manual_seed(seed)
    q, k = (F.normalize(torch.randn(batch, HEADS, length, KEY, generator=g), dim=-1) for _ in range(2))
    v = torch.randn(batch, HEADS, length, VALUE, generator=g)
    decay = -torch.exp(3 * torch.randn(batch, HEADS, length, generator=g) - 2)
    return q, k, v, decay, torch.rand(batch, HEADS, length, generator=g)


def quiet(x: Inputs, positions: Tensor) -> Inputs:
    """What the layer makes of padding: nothing is written and nothing decays."""
    real = (positions >= 0).unsqueeze(1)
    return *x[:3], x[3] * real, x[4] * real


def the_papers(x: Inputs, positions: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """S_t = S_(t-1) a_t (I - b_t k_t k_t^T) + b_t v_t k_t^T, o_t = S_t q_t (eq. 10), one row, head and token at a time."""
    q, k, v, g, beta = (part.double() for part in x)
    out, last = torch.zeros_like(v), state.double().clone()
    for b in range(len(q)):
        for h in range(HEADS):
            s = last[b, h].T  # the paper's [dv,dk]
            for t in range(q.shape[2]):
                if positions[b, t] < 0:
                    continue
                key, alpha = k[b, h, t], g[b, h, t].exp() * (positions[b, t] > 0)
                s = alpha * s @ (torch.eye(KEY, dtype=s.dtype) - beta[b, h, t] * torch.outer(key, key))
                s = s + beta[b, h, t] * torch.outer(v[b, h, t], key)
                out[b, h, t] = s @ q[b, h, t]
            last[b, h] = s.T
    return out.float(), last.float()


def nothing(batch: int) -> Tensor:
    return torch.zeros(batch, HEADS, KEY, VALUE)


def counting(batch: int, length: int) -> Tensor:
    return torch.arange(length).expand(batch, -1)


def documents(positions: Tensor) -> Tensor:
    return (positions == 0).cumsum(-1)


@pytest.mark.parametrize("length", LENGTHS)
def test_the_forms_agree_around_chunk_boundaries(length: int) -> None:
    x, at = inputs(2, length), counting(2, length)
    want, last = the_papers(x, at, nothing(2))
    for form in (recurrent, chunked):
        got, state = form(*x, documents(at), nothing(2))
        assert gap(got, want) < 1e-5 and gap(state, last) < 1e-5
        broken, _ = form(*x[:4], x[4] * 0.9, documents(at), nothing(2))
        assert gap(broken, want) > 1e-2  # the twin


def test_transformers_form_agrees() -> None:
    """Where it can: it takes differences of sums of decays, which lose small ones beside a large one."""
    theirs = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next").torch_chunk_gated_delta_rule
    x, at = inputs(2, CHUNK + 9), counting(2, CHUNK + 9)
    x = (*x[:3], x[3].clamp(min=-2), x[4])
    q, k, v, g, beta = (part.transpose(1, 2) for part in x)
    want, last = theirs(q * KEY**0.5, k, v, g=g, beta=beta, output_final_state=True)  # it scales q
    got, state = chunked(*x, documents(at), nothing(2))
    assert gap(got.transpose(1, 2), want) < 1e-5 and gap(state, last) < 1e-5


def test_gradients_are_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against finite differences, over chunks, documents and a state that is carried in."""
    monkeypatch.setattr(delta, "CHUNK", 4)
    at = torch.tensor([[3, 4, 5, 6, 7, 8, 0, 1, 2, 3]])
    leaves = [part.double()[:, :1].requires_grad_() for part in inputs(1, 10)]
    state = torch.randn(1, 1, KEY, VALUE, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *a: chunked(*a[:5], documents(at), a[5]), (*leaves, state))
    grads = []
    for form in (chunked, recurrent):
        o, s = form(*leaves, documents(at), state)
        grads.append(torch.autograd.grad(o.square().sum() + s.sum(), (*leaves, state)))
    assert all(gap(a, b) < 1e-10 for a, b in zip(*grads, strict=True))


PACKED = [[3, 2, 4, 1], [CHUNK, 1, CHUNK - 1, 5], [CHUNK + 3, CHUNK, 2]]


@pytest.mark.parametrize("lengths", PACKED, ids=str)
@pytest.mark.parametrize("padding", [0, 7])
def test_packed_documents_and_padding(lengths: list[int], padding: int) -> None:
    at = torch.cat([torch.arange(n) for n in lengths] + [torch.full((padding,), -1)])
    other = torch.cat((torch.full((padding,), -1), torch.arange(len(at) - padding)))  # left-padded, one document
    positions = torch.stack((at, other))
    x = quiet(inputs(2, len(at)), positions)
    want, last = the_papers(x, positions, nothing(2))
    real = (positions >= 0)[:, None, :, None]
    for form in (recurrent, chunked):
        got, state = form(*x, documents(positions), nothing(2))
        assert gap(got * real, want) < 1e-5 and gap(state, last) < 1e-5
    leaky, _ = chunked(*x, documents(positions).clamp(max=1), nothing(2))
    assert gap(leaky * real, want) > 0.01  # the twin: documents run together


@pytest.mark.parametrize("sizes", [[1, 1, 5, 1], [CHUNK, 1, CHUNK + 2, 1], [3, 2 * CHUNK, 30]], ids=str)
def test_a_state_is_carried_over_calls(sizes: list[int]) -> None:
    """Row 0 starts at 0 after a stale state; row 1 goes on from position 40; each call padded differently."""
    total = sum(sizes)
    x = inputs(2, total)
    start = torch.randn(2, HEADS, KEY, VALUE, generator=torch.Generator().manual_seed(4))
    positions = torch.stack((torch.arange(total), torch.arange(40, 40 + total)))
    want, last = the_papers(x, positions, start)
    state, broken, at = start, start, 0
    for call, n in enumerate(sizes):
        part, pad = slice(at, at + n), (call % 2) * 3  # padded left and right in every other call
        ids = F.pad(positions[:, part], (pad, pad), value=-1)
        piece = [F.pad(y[:, :, part], (0, 0, pad, pad), value=7.0) for y in x[:3]]
        piece += [F.pad(y[:, :, part], (pad, pad), value=0.5) for y in x[3:]]
        piece = quiet(tuple(piece), ids)  # type: ignore[arg-type,assignment]
        form = recurrent if ids.shape[1] == 1 else chunked
        got, state = form(*piece, documents(ids), state)
        _, broken = form(*piece, documents(ids), broken * 1.1)
        assert gap(got[:, :, pad : pad + n], want[:, :, part]) < 1e-5
        at += n
    assert gap(state, last) < 1e-5 and torch.isfinite(broken).all()


def test_a_state_that_does_not_fade_shows() -> None:
    """The twin of the one above: with slow decay a changed state is seen to the end."""
    q, k, v, g, beta = inputs(1, 6)
    start, at = torch.ones(1, HEADS, KEY, VALUE), torch.arange(40, 46)[None]
    one, two = (chunked(q, k, v, g * 1e-3, beta * 0.1, documents(at), s)[0] for s in (start, 1.1 * start))
    assert gap(one, two) > 1e-2


# ------------------------------------------------------------------------------------- the convolution
def test_the_convolution_stays_in_its_document_and_goes_on_in_later_calls() -> None:
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(2, 14, 6, generator=g), torch.randn(6, 1, 4, generator=g)
    empty = torch.zeros(2, 3, 6)

    def alone(part: Tensor) -> Tensor:  # [n,W], one document
        return F.conv1d(F.pad(part.T, (3, 0))[None], weight, groups=6)[0].T

    positions = torch.tensor([[*range(5), *range(2), *range(7)], [-1, -1, *range(9), -1, -1, -1]])
    out, after = short_conv(x, weight, positions, empty)
    for row, begin, end in ((0, 0, 5), (0, 5, 7), (0, 7, 14), (1, 2, 11)):
        assert gap(out[row, begin:end], alone(x[row, begin:end])) < 1e-5
    assert torch.equal(after, torch.stack((x[0, 11:], x[1, 8:11])))
    whole, _ = short_conv(x, weight, None, empty)
    assert gap(whole[1], alone(x[1])) < 1e-5 and gap(whole[0, 5:7], out[0, 5:7]) > 0.1  # the twin: it leaks
    # both rows go on, by one token, by none (an idle row), and from scratch
    more = torch.randn(2, 4, 6, generator=g)
    out, after = short_conv(more, weight, torch.tensor([[-1, 7, 8, -1], [-1, -1, -1, -1]]), after)
    assert gap(out[0, 1:3], alone(torch.cat((x[0, 7:], more[0, 1:3])))[-2:]) < 1e-5
    assert torch.equal(after[0], torch.cat((x[0, 13:], more[0, 1:3]))) and torch.equal(after[1], x[1, 8:11])
    out, _ = short_conv(more, weight, torch.tensor([[0, 1, 2, 3], [9, 10, 11, 12]]), after)
    assert gap(out[0], alone(more[0])) < 1e-5 and gap(out[1], alone(torch.cat((x[1, 2:11], more[1])))[-4:]) < 1e-5


# ------------------------------------------------------------------------------------------- the layer
def test_under_autocast_the_state_is_exact() -> None:
    """Only the projections round: what runs on given q, k, v and rates is bit-equal with and without autocast."""
    model = noisy(spec_of("delta/dense"))
    mixer, x = model.layers[0].mixer, model.embed[tokens_of(2, 9)]
    layout = Layout(None, 2, 9, x.device)
    seen: list[tuple[Tensor, ...]] = []
    real = delta.chunked

    def spy(*args: Tensor) -> tuple[Tensor, Tensor]:
        o, state = real(*args)
        with torch.autocast("cpu", enabled=False):
            plain = real(*args)
        seen.append((o, state, *plain))
        return o, state

    delta.chunked = spy
    try:
        with torch.autocast("cpu", torch.bfloat16):
            got = mixer(x, layout)
    finally:
        delta.chunked = real
    o, state, plain_o, plain_state = seen[0]
    assert o.dtype == state.dtype == torch.float32
    assert torch.equal(o, plain_o) and torch.equal(state, plain_state)
    want = mixer(x, layout)
    assert got.dtype == torch.bfloat16 and 1e-4 < gap(got.float(), want) < 0.1


def test_a_new_layer_decays_slowly_and_its_filters_are_not_matrices() -> None:
    model = Transformer(spec_of("delta/dense*4"))
    for layer in model.layers:
        step, a = F.softplus(layer.mixer.dt_bias), layer.mixer.A_log.exp()
        assert (step > 0.9e-3).all() and (step < 0.11).all() and (a >= 1).all() and (a <= 16).all()
        assert len(step.unique()) == len(a.unique()) == 4
    groups = model.optimizer_groups()
    assert {n.rsplit(".", 1)[-1] for n in groups["others"]} == {"embed", "conv", "A_log", "dt_bias", "weight"}
    assert "layers.0.mixer.beta_proj.weight" in groups["matrices"]


def test_centred_norms_start_at_zero_and_are_norms() -> None:
    spec = spec_of("delta/dense out_gate/moe", mtp=1).model_copy(update={"centred_norms": True})
    model, plain, tokens = Transformer(spec), Transformer(spec_of("delta/dense out_gate/moe", mtp=1)), tokens_of(2, 9)
    zero = {n for n, p in model.named_parameters() if n.endswith("norm.weight") and not p.any()}
    assert {"norm.weight", "layers.0.mixer_norm.weight", "layers.1.mixer.q_norm.weight", "mtp.0.norm.weight"} <= zero
    assert "layers.0.mixer.norm.weight" not in zero  # within linear attention a norm is plain
    state = {n: p + 1 if n in zero else p for n, p in noisy(spec).state_dict().items()}
    plain.load_state_dict(state)
    assert gap(noisy(spec)(tokens), plain(tokens)) < 1e-5
    assert gap(noisy(spec)(tokens), noisy(spec_of("delta/dense out_gate/moe", mtp=1))(tokens)) < 1e-5  # 1 + noise
    state["layers.1.mixer.q_norm.weight"] -= 1
    plain.load_state_dict(state)
    assert gap(noisy(spec)(tokens), plain(tokens)) > 1e-3  # the twin


def test_a_row_of_sizes_that_do_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="multiple of key_heads"):
        GatedDeltaNet(heads=3, key_heads=2, key_dim=4, value_dim=4)
    with pytest.raises(ValueError, match="needs qk_norm"):
        MIXERS["gqa"].__class__.model_validate(MIXERS["gqa"].model_dump() | {"qk_norm_over": "all"})


def test_bf16_is_about_as_far_from_fp32_as_transformers(tmp_path: Path) -> None:
    """Small heads make bf16 coarse: their norms enlarge outputs that are almost zero. Theirs says how coarse."""
    pytest.importorskip("transformers")
    from test_hub_checkpoint import peer
    from trivet.hub.checkpoint import load_checkpoint

    ours_off = theirs_off = 0.0
    for seed in range(3):
        theirs = peer("qwen3_next", seed, tmp_path / str(seed))
        ours = load_checkpoint(tmp_path / str(seed), dtype=torch.bfloat16)
        rounded = copy.deepcopy(theirs).to(torch.bfloat16)
        tokens = torch.randint(0, ours.spec.vocab_size, (2, 90), generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            want = theirs(tokens, use_cache=False).logits
            theirs_off += float((rounded(tokens, use_cache=False).logits.float() - want).norm() / want.norm())
            ours_off += float((ours.logits(ours(tokens)).float() - want).norm() / want.norm())
    assert 0.01 < ours_off < 1.25 * theirs_off < 1
