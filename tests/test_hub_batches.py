"""Batches of unequal lengths: transformers is given masks and left padding, we are given positions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from test_hub_checkpoint import peer
from test_hub_configs import CONFIGS
from test_model_zoo import gap
from trivet.hub.checkpoint import load_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:.*every dimension of a head is rotated")
LENGTHS = (29, 11, 1, 20)


def documents(vocab: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(1)
    return [torch.randint(1, vocab, (n,), generator=g) for n in LENGTHS]


@pytest.mark.parametrize("family", CONFIGS)
def test_left_padded_rows(family: str, tmp_path: Path) -> None:
    """The prompt of a batched generation: shorter rows begin with padding, positions count from the first token."""
    theirs = peer(family, 1, tmp_path)
    ours = load_checkpoint(tmp_path)
    texts, width = documents(ours.spec.vocab_size), max(LENGTHS)
    tokens = torch.zeros(len(texts), width, dtype=torch.long)
    positions = torch.full_like(tokens, -1)
    for row, text in enumerate(texts):
        tokens[row, -len(text) :] = text
        positions[row, -len(text) :] = torch.arange(len(text))
    there = positions >= 0
    with torch.no_grad():
        want = theirs(
            tokens, attention_mask=there.long(), position_ids=positions.clamp(min=0), use_cache=False
        ).logits[there]  # fmt: skip
        assert gap(ours.logits(ours(tokens, positions))[there], want) < 1e-4
        caches = ours.new_caches(len(texts), width)
        cached = ours(tokens, positions, caches, span=width)
        assert gap(ours.logits(cached)[there], want) < 1e-4
        assert gap(ours.logits(ours(tokens))[there], want) > 1e-2  # the twin: padding taken for text


@pytest.mark.parametrize("family", CONFIGS)
def test_packed_rows(family: str, tmp_path: Path) -> None:
    """Documents one after the other in a row, each as if it were alone, as transformers computes it alone."""
    theirs = peer(family, 1, tmp_path)
    ours = load_checkpoint(tmp_path)
    texts = documents(ours.spec.vocab_size)
    row = torch.cat(texts)[None]
    positions = torch.cat([torch.arange(len(text)) for text in texts])[None]
    with torch.no_grad():
        want = torch.cat([theirs(text[None], use_cache=False).logits[0] for text in texts])[None]
        assert gap(ours.logits(ours(row, positions)), want) < 1e-4
        padded = torch.nn.functional.pad(row, (0, 5)), torch.nn.functional.pad(positions, (0, 5), value=-1)
        assert gap(ours.logits(ours(*padded))[:, :-5], want) < 1e-4
        assert gap(ours.logits(ours(row)), want) > 1e-2  # the twin: one document
        if family not in ("minimax", "qwen3_next"):  # transformers' own packing; its linear layers do not know it
            packed = theirs(row, position_ids=positions, use_cache=False).logits
            assert gap(ours.logits(ours(row, positions)), packed) < 1e-4
