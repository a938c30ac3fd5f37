"""Nested ranks: what a step computes, how ranks are drawn, and that a model learns to do with fewer numbers."""

from __future__ import annotations

import pytest
import torch

from test_model_zoo import gap, next_token_loss, noisy, spec_of, tokens_of
from test_train_trainer import CONFIG, Counting
from trivet.config import UserError
from trivet.model import Transformer
from trivet.spec import MLA
from trivet.train.nested import shortened
from trivet.train.trainer import train


def seed_of(rank: int, least: int, model: Transformer) -> int:
    """A seed that draws this rank."""
    for seed in range(10_000):
        with shortened(model, least, seed) as drawn:
            if drawn == rank:
                return seed
    raise AssertionError(f"rank {rank} is never drawn")


def test_a_shortened_latent_is_a_narrower_matrix() -> None:
    """The same numbers come from kv_up with zeros where the latent's are, and no gradient goes there."""
    model, twin, tokens = noisy(spec_of("mla/dense*2")), noisy(spec_of("mla/dense*2")), tokens_of(2, 15)
    with torch.no_grad():
        for layer in twin.layers:
            layer.mixer.kv_up.weight[:, 4:] = 0  # type: ignore[union-attr,index]
    with shortened(model, 2, seed_of(4, 2, model)) as rank:
        loss, want = next_token_loss(model, tokens), next_token_loss(twin, tokens)
        loss.backward()
    assert rank == 4 and gap(loss, want) < 1e-6 and gap(next_token_loss(model, tokens), want) > 1e-3  # and the twin
    for layer in model.layers:
        grad = layer.mixer.kv_up.weight.grad  # type: ignore[union-attr]
        assert bool(grad[:, :4].abs().gt(0).any()) and not grad[:, 4:].any()  # type: ignore[union-attr,index]


def test_half_of_the_steps_keep_everything() -> None:
    model = noisy(spec_of("mla/dense"))
    drawn = []
    for seed in range(2000):
        with shortened(model, 3, seed) as rank:
            drawn.append(rank)
    share = drawn.count(10) / 2000  # one in eight of the other half, too
    assert set(drawn) == set(range(3, 11)) and abs(share - (0.5 + 0.5 / 8)) < 0.04
    with shortened(model, 0, 1) as rank:
        assert rank == 10


def test_what_has_no_such_latents_is_refused() -> None:
    for pattern, least in (("gqa/dense", 2), ("mla/dense", 11)):
        with pytest.raises(UserError, match="nested_rank"), shortened(noisy(spec_of(pattern)), least, 0):
            pass


def test_a_model_learns_to_do_with_fewer_numbers(tmp_path) -> None:  # type: ignore[no-untyped-def]
    def loss_at(rank: int, nested: int) -> float:
        spec = spec_of("mla/dense").model_copy(update={"vocab_size": 23})
        model = Transformer(spec, seed=1)
        config = CONFIG.model_copy(update={"steps": 120, "accumulate": 1, "nested_rank": nested, "log_every": 1000})
        train(model, Counting(), config, tmp_path / f"{rank}-{nested}")
        assert isinstance(spec.layers[0].mixer, MLA)
        tokens = (torch.arange(14) + torch.arange(23)[:, None]) % 23
        with torch.no_grad(), shortened(model, rank, seed_of(rank, rank, model)):
            return float(next_token_loss(model, tokens))

    assert loss_at(2, 2) < loss_at(2, 0)
