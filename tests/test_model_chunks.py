"""Dual chunk attention against its definition: a matrix of relative positions, pair by pair."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from test_model_zoo import MIXERS, gap, noisy, spec_of, tokens_of
from trivet.model import Transformer, blocks
from trivet.model.layers import Layout, inverse_frequencies, rotation_amplitude
from trivet.spec import GQA, DualChunks, ModelSpec, Rope, Yarn

T = 30


def spec_with(chunks: DualChunks | None, rope: Rope | None = None) -> ModelSpec:
    gqa = GQA(heads=4, kv_heads=2, head_dim=8, rope=rope or Rope(dims=8, theta=100.0), chunks=chunks)
    return spec_of("gqa/dense*2").model_copy(update={"mixers": MIXERS | {"gqa": gqa}})


def distance(i: int, j: int, c: DualChunks) -> int:
    """M[i][j] of the paper's section 3, with the far end at chunk_size as in the released code."""
    n, apart = c.chunk_size - c.local_size, i // (c.chunk_size - c.local_size) - j // (c.chunk_size - c.local_size)
    key = j % n
    if apart == 0:
        return i % n - key
    if apart == 1:
        return min(i % n + n, c.chunk_size) - key
    return min(2 * n - 1, c.chunk_size) - key


def definition(model: Transformer, tokens: Tensor, chunks: DualChunks) -> Tensor:
    """The whole model with its attention written pair by pair: q_i turned by M[i][j], k_j not at all."""

    def attention(layer: torch.nn.Module, x: Tensor, layout: Layout, cache: None = None) -> Tensor:
        s = layer.spec
        q = layer.q_norm(layer.q_proj(x).unflatten(-1, (s.heads, s.head_dim)))
        k = layer.k_norm(layer.k_proj(x).unflatten(-1, (s.kv_heads, s.head_dim)))
        v = layer.v_proj(x).unflatten(-1, (s.kv_heads, s.head_dim))
        k, v = (a.repeat_interleave(s.heads // s.kv_heads, 2) for a in (k, v))
        length, half = x.shape[1], s.rope.dims // 2
        scores = torch.full((len(x), s.heads, length, length), -math.inf)
        turn = inverse_frequencies(s.rope)
        for i in range(length):
            m = (
                1.0
                if chunks.original_length is None
                else max(1.0, 0.1 * math.log((i + 1) / chunks.original_length) + 1)
            )
            for j in range(i + 1):
                angle = turn * distance(i, j, chunks)
                a, b = q[:, i, :, :half], q[:, i, :, half : 2 * half]
                turned = torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), -1)
                turned = turned * rotation_amplitude(s.rope) ** 2
                turned = torch.cat((turned, q[:, i, :, 2 * half :]), -1)
                scores[:, :, i, j] = (turned * k[:, j]).sum(-1) * s.head_dim**-0.5 * m * m
        return layer.o_proj(torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v).flatten(2))

    before = type(model.layers[0].mixer).forward
    type(model.layers[0].mixer).forward = attention  # type: ignore[method-assign,assignment]
    try:
        return model(tokens)
    finally:
        type(model.layers[0].mixer).forward = before  # type: ignore[method-assign]


CASES = {
    "Qwen's proportions": DualChunks(chunk_size=9, local_size=2),
    "no local window": DualChunks(chunk_size=6, local_size=0),
    "mostly local": DualChunks(chunk_size=9, local_size=6),
    "temperature": DualChunks(chunk_size=9, local_size=3, original_length=5),
    "chunks of one": DualChunks(chunk_size=4, local_size=3),
}


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_ranges_and_pairs_are_the_definition(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    chunks, tokens = CASES[name], tokens_of(2, T)
    yarn = Yarn(factor=2, original_length=16, beta_fast=4.0)
    for rope in (Rope(dims=8, theta=100.0), Rope(dims=4, theta=100.0), Rope(dims=8, theta=100.0, yarn=yarn)):
        model = noisy(spec_with(chunks, rope))
        want = definition(model, tokens, chunks)
        assert gap(model(tokens), want) < 1e-5
        positions = torch.arange(T).expand(2, -1)
        assert gap(model(tokens, positions, model.new_caches(2, T)), want) < 1e-5  # by pairs
        with monkeypatch.context() as patch:
            patch.setattr(blocks, "BLOCK", 5)  # blocks that end inside a chunk
            patch.setattr(blocks, "SCORES", 64)
            assert gap(model(tokens), want) < 1e-5


@pytest.mark.parametrize(
    "other",
    [
        {"chunk_size": 10, "local_size": 4},
        {"chunk_size": 10},
        {"local_size": 4},
        {"original_length": 6},
        {"original_length": None},
    ],
)
@torch.no_grad()
def test_the_definition_notices_another_number(other: dict[str, int | None]) -> None:
    """The twin: with any other chunk, window or temperature it is another function."""
    chunks = CASES["temperature"]
    model, tokens = noisy(spec_with(chunks)), tokens_of(1, T)
    assert gap(model(tokens), definition(model, tokens, chunks.model_copy(update=other))) > 1e-3


@torch.no_grad()
def test_it_is_plain_attention_up_to_chunk_size_and_not_further() -> None:
    chunks, tokens = DualChunks(chunk_size=12, local_size=4), tokens_of(2, T)
    ours, plain = noisy(spec_with(chunks))(tokens), noisy(spec_with(None))(tokens)
    same = chunks.chunk_size + 1  # a query at position chunk_size still has room for its true distance to key 0
    assert gap(ours[:, :same], plain[:, :same]) < 1e-5
    assert gap(ours[:, same : same + 1], plain[:, same : same + 1]) > 1e-3


def test_gradients_of_ranges_and_pairs_agree() -> None:
    tokens, found = tokens_of(2, T), []
    for positions in (None, torch.arange(T).expand(2, -1)):
        model = noisy(spec_with(CASES["temperature"]))
        layout = Layout(positions, 2, T, tokens.device)
        x = model.embed[tokens]
        model.layers[0].mixer(x, layout).square().sum().backward()
        found.append([p.grad for p in model.layers[0].mixer.parameters()])
    for a, b in zip(*found, strict=True):
        assert a is not None and b is not None and gap(a, b) < 1e-5 and a.abs().max() > 0


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"window": 5}, "no window"),
        ({"rope": Rope(dims=0)}, "rope.dims > 0"),
        ({"chunks": {"chunk_size": 4, "local_size": 4}}, "must be below chunk_size"),
    ],
)
def test_what_chunks_cannot_do_is_refused(change: dict[str, object], says: str) -> None:
    values = {
        "heads": 2,
        "kv_heads": 1,
        "head_dim": 8,
        "rope": {"dims": 8},
        "chunks": {"chunk_size": 8, "local_size": 2},
    }
    GQA(**values)  # type: ignore[arg-type]
    with pytest.raises(ValidationError, match=says):
        GQA(**values | change)  # type: ignore[arg-type]
