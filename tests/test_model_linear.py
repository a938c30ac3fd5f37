"""Lightning attention: recurrent == chunked == quadratic == the recurrence == MiniMax's block form."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from test_model_zoo import gap, noisy, spec_of, tokens_of
from trivet.model import linear
from trivet.model.linear import CHUNK, chunked, decay_slopes, quadratic, recurrent

HEADS, DIM = 3, 5
SLOPES = decay_slopes(HEADS, 1, 4)
LENGTHS = [1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 2 * CHUNK + 37]


def qkv(batch: int, length: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(batch, HEADS, length, DIM, generator=g) for _ in range(3))
    return q, k, v


def one_document(batch: int, length: int, start: int = 0) -> tuple[Tensor, Tensor]:
    positions = torch.arange(start, start + length).expand(batch, -1)
    return (positions == 0).cumsum(-1), positions


def recurrence(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """KV_t = e^-s KV_(t-1) + k_t^T v_t, o_t = q_t KV_t, one row, head and token at a time."""
    out, state = torch.zeros_like(v), state.clone()
    for b in range(q.shape[0]):
        for h in range(HEADS):
            for t in range(q.shape[2]):
                if positions[b, t] < 0:
                    continue
                kept = 0.0 if positions[b, t] == 0 else math.exp(-float(SLOPES[h]))
                state[b, h] = kept * state[b, h] + torch.outer(k[b, h, t], v[b, h, t])
                out[b, h, t] = q[b, h, t] @ state[b, h]
    return out, state


def minimax_blocks(q: Tensor, k: Tensor, v: Tensor, block: int) -> Tensor:
    """The block form of MiniMax's released code: local indices from 1, B = block, m rows in this block."""
    out, (batch, _, length, dim) = torch.empty_like(v), q.shape
    s = SLOPES[:, None, None]
    kv = torch.zeros(batch, HEADS, dim, dim)
    for start in range(0, length, block):
        part = slice(start, min(start + block, length))
        m = part.stop - part.start
        i = torch.arange(1, m + 1)
        q_decay = torch.exp(-s * i[:, None])
        k_decay = torch.exp(-s * (block - torch.arange(1, block + 1)[:, None]))[:, -m:]
        diagonal = torch.exp(-s * (i[:, None] - i)) * (i[:, None] >= i)
        qb, kb, vb = q[:, :, part], k[:, :, part], v[:, :, part]
        out[:, :, part] = (qb * q_decay) @ kv + ((qb @ kb.transpose(-1, -2)) * diagonal) @ vb
        kv = torch.exp(-s * m) * kv + (kb * k_decay).transpose(-1, -2) @ vb
    return out


@pytest.mark.parametrize("length", LENGTHS)
def test_the_forms_agree_around_chunk_boundaries(length: int) -> None:
    q, k, v = qkv(2, length)
    docs, positions = one_document(2, length)
    want, last = recurrence(q, k, v, positions, torch.zeros(2, HEADS, DIM, DIM))
    got, state = chunked(q, k, v, SLOPES, docs, None, None)
    assert gap(got, want) < 1e-5 and gap(state, last) < 1e-5
    assert gap(quadratic(q, k, v, SLOPES, docs, positions), want) < 1e-5
    assert gap(minimax_blocks(q, k, v, 256), want) < 1e-5
    assert gap(minimax_blocks(q, k, v, 100), want) < 1e-5


@pytest.mark.parametrize("length", [CHUNK + 1, 2 * CHUNK + 37])
def test_gradients_of_chunked_and_quadratic_agree(length: int) -> None:
    docs, positions = one_document(1, length)
    grads = []
    for form in (lambda *a: chunked(*a, None)[0], quadratic):
        leaves = [x.requires_grad_() for x in qkv(1, length)]
        form(*leaves, SLOPES, docs, positions).mul(qkv(1, length, seed=9)[0]).sum().backward()
        grads.append([x.grad for x in leaves])
    for a, b in zip(*grads, strict=True):
        assert gap(a, b) < 1e-5


def test_recurrent_steps_are_the_recurrence() -> None:
    """Rows at different positions, one starting anew (0), one idle (-1)."""
    q, k, v = qkv(4, 1)
    state = torch.randn(4, HEADS, DIM, DIM, generator=torch.Generator().manual_seed(3))
    positions = torch.tensor([[5], [0], [-1], [900]])
    want, last = recurrence(q, k, v, positions, state)
    got, after = recurrent(q, k, v, SLOPES, positions * 0, positions, state)
    real = [0, 1, 3]
    assert gap(got[real], want[real]) < 1e-5 and gap(after, last) < 1e-5
    assert torch.equal(after[2], state[2])


PACKED = [
    [3, 2, 4, 1],  # several documents in one chunk
    [CHUNK, 1, CHUNK - 1, 5],  # documents that end exactly at a boundary, and one inside
    [CHUNK + 3, CHUNK, 2],
]


@pytest.mark.parametrize("lengths", PACKED, ids=str)
@pytest.mark.parametrize("padding", [0, 7])
def test_packed_documents_and_padding(lengths: list[int], padding: int) -> None:
    at = torch.cat([torch.arange(n) for n in lengths] + [torch.full((padding,), -1)])
    other = torch.cat((torch.full((padding,), -1), torch.arange(len(at) - padding)))  # left-padded, one document
    positions = torch.stack((at, other))
    q, k, v = qkv(2, len(at))
    want, last = recurrence(q, k, v, positions, torch.zeros(2, HEADS, DIM, DIM))
    docs, real = (positions == 0).cumsum(-1), (positions >= 0)[:, None, :, None]
    got, state = chunked(q, k, v, SLOPES, docs, positions, None)
    assert gap(got * real, want) < 1e-5 and gap(state, last) < 1e-5
    assert gap(quadratic(q, k, v, SLOPES, docs, positions) * real, want) < 1e-5
    leaky, _ = chunked(q, k, v, SLOPES, docs.clamp(max=1), positions, None)
    assert gap(leaky * real, want) > 0.01  # the twin: documents run together


@pytest.mark.parametrize("sizes", [[1, 1, 5, 1], [CHUNK, 1, CHUNK + 2, 1], [3, 2 * CHUNK, 30]], ids=str)
def test_a_state_is_carried_over_calls(sizes: list[int]) -> None:
    """Row 0 starts at 0 after a stale state; row 1 goes on from position 40; each call padded differently."""
    total = sum(sizes)
    q, k, v = qkv(2, total)
    start = torch.randn(2, HEADS, DIM, DIM, generator=torch.Generator().manual_seed(4))
    positions = torch.stack((torch.arange(total), torch.arange(40, 40 + total)))
    want, last = recurrence(q, k, v, positions, start)
    state, broken, at = start, start, 0
    for call, n in enumerate(sizes):
        part, pad = slice(at, at + n), (call % 2) * 3  # padded left and right in every other call
        ids = torch.nn.functional.pad(positions[:, part], (pad, pad), value=-1)
        piece = [torch.nn.functional.pad(x[:, :, part], (0, 0, pad, pad), value=7.0) for x in (q, k, v)]
        form = recurrent if ids.shape[1] == 1 else chunked
        got, state = form(*piece, SLOPES, (ids == 0).cumsum(-1), ids, state)
        _, broken = form(*piece, SLOPES * 1.1, (ids == 0).cumsum(-1), ids, broken)
        mine = slice(pad, pad + n)
        assert gap(got[:, :, mine], want[:, :, part]) < 1e-5
        at += n
    assert gap(state, last) < 1e-5 and gap(broken, last) > 1e-3


def test_slopes_are_minimax_values() -> None:
    slopes = decay_slopes(64, 7, 80)
    for h in (0, 13, 63):
        assert float(slopes[h]) == pytest.approx(2 ** (-(h + 1) / 8) * (1 - 7 / 79 + 1e-5), rel=1e-6)
    assert float(decay_slopes(8, 79, 80)[0]) == pytest.approx(0.5e-5, rel=1e-6)
    assert float(decay_slopes(1, 0, 1)[0]) > 0  # a model of one layer does not divide by zero


def test_layer_joins_the_parts_as_published(monkeypatch: pytest.MonkeyPatch) -> None:
    """out_proj(sigmoid(gate x) * norm(O)), the norm over all heads jointly, silu on q, k, v."""
    monkeypatch.setattr(linear, "CHUNK", 4)
    model = noisy(spec_of("lightning/dense*2"))
    layer = model.layers[0]
    mixer, x = layer.mixer, layer.mixer_norm(model.embed[tokens_of(1, 11)])
    q, k, v = (
        torch.nn.functional.silu(x @ p.weight.T).view(1, 11, 3, 8).transpose(1, 2)
        for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj)
    )
    o = quadratic(q, k, v, decay_slopes(3, 0, 2), *one_document(1, 11)).transpose(1, 2).reshape(1, 11, 24)
    o = o / (o.square().mean(-1, keepdim=True) + 1e-6).sqrt() * mixer.norm.weight
    want = (torch.sigmoid(x @ mixer.gate.weight.T) * o) @ mixer.o_proj.weight.T
    from trivet.model.layers import Layout

    assert gap(mixer(x, Layout(None, 1, 11, x.device)), want) < 1e-5
    assert gap(mixer(x.roll(1, 1), Layout(None, 1, 11, x.device)), want) > 1e-2
