"""Tokens are drawn from the distribution that was asked for, by a number that depends on nothing else."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from trivet.engine.sampling import BLOCK, Settings, draw, sample, truncate, uniform

V = 50


def rows(n: int, temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0, min_p: float = 0.0) -> Settings:
    return Settings(
        torch.full((n,), temperature), torch.full((n,), top_p), torch.full((n,), top_k), torch.full((n,), min_p),
        torch.arange(n),
    )  # fmt: skip


def random_logits(n: int, seed: int = 0) -> Tensor:
    return 3 * torch.randn(n, V, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "setting", [{"top_k": 7}, {"top_p": 0.8}, {"min_p": 0.1}, {"top_k": 12, "top_p": 0.7}, {"top_k": 20, "min_p": 0.05},
                {"top_k": 1}, {"top_p": 0.01}]
)  # fmt: skip
def test_truncation_is_that_of_transformers(setting: dict[str, float]) -> None:
    from transformers.generation.logits_process import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = random_logits(200)
    theirs, ids = logits.clone(), torch.zeros(200, 1, dtype=torch.long)
    for name, warper in (("top_k", TopKLogitsWarper), ("top_p", TopPLogitsWarper), ("min_p", MinPLogitsWarper)):
        if name in setting:
            theirs = warper(setting[name])(ids, theirs)
    ours = truncate(logits, rows(200, **setting))  # type: ignore[arg-type]
    kept = ours.isfinite()
    assert torch.equal(kept, theirs.isfinite()) and torch.equal(ours[kept], logits[kept])
    assert 1 <= kept.sum(-1).min() and kept.sum(-1).max() < V


def chi_square(tokens: Tensor, p: Tensor) -> float:
    """Pearson's statistic over cells of at least 5 expected draws, in standard deviations from its mean."""
    expected = p * len(tokens)
    counts = torch.bincount(tokens, minlength=len(p)).double()
    big = expected >= 5
    cells = torch.cat((((counts - expected)[big] ** 2 / expected[big]), _rest(counts, expected, ~big)))
    freedom = len(cells) - 1
    return (cells.sum().item() - freedom) / math.sqrt(2 * freedom)


def _rest(counts: Tensor, expected: Tensor, small: Tensor) -> Tensor:
    e = expected[small].sum()
    return ((counts[small].sum() - e) ** 2 / e)[None] if e > 0 else e.new_zeros(0)


@pytest.mark.parametrize("setting", [{}, {"temperature": 0.5}, {"temperature": 2.0, "top_k": 9}, {"top_p": 0.85}])
def test_frequencies_are_the_distribution(setting: dict[str, float]) -> None:
    n = 20_000
    logits = random_logits(1) / 3
    asked = rows(n, **setting)  # type: ignore[arg-type]
    tokens, logprobs, raw = sample(logits.expand(n, -1), asked, torch.zeros(n, dtype=torch.long))
    scaled = logits.log_softmax(-1) / asked.temperature[0]
    p = (truncate(scaled, asked[torch.tensor([0])]) if len(setting) > 1 or "top_p" in setting else scaled).softmax(-1)[
        0
    ]
    assert abs(chi_square(tokens, p.double())) < 4
    torch.testing.assert_close(logprobs, p.log()[tokens], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(raw, logits.log_softmax(-1)[0][tokens], atol=1e-6, rtol=1e-6)
    tilted = (p * torch.linspace(0.7, 1.3, V)).double()  # the twin: a slightly other distribution is found out
    assert chi_square(tokens, tilted / tilted.sum()) > 4


@pytest.mark.parametrize("size", [1, BLOCK - 1, BLOCK, 3 * BLOCK, 3 * BLOCK + 5])
def test_a_draw_by_blocks_is_the_draw_from_the_running_sum(size: int) -> None:
    g = torch.Generator().manual_seed(size)
    p = torch.randn(4000, size, generator=g).mul(3).softmax(-1) * (torch.rand(4000, size, generator=g) < 0.3)
    p[:, size // 2] += 1e-3
    u = torch.rand(4000, generator=g, dtype=torch.float64)
    u[:50], u[50:100] = 0.0, 1 - 2.0**-53  # the ends
    cdf = p.double().cumsum(-1)
    want = torch.searchsorted(cdf, u[:, None] * cdf[:, -1:], right=True).squeeze(-1)
    got = draw(p, u)
    assert (got != want).float().mean() < 2e-3  # where u lies within rounding of a step, as at its end
    assert (p.gather(-1, got[:, None]) > 0).all()  # what can't be drawn never is
    assert size == 1 or (draw(p, 1 - u) != want).float().mean() > 0.1


def test_greedy_takes_the_best_and_rows_keep_their_own_settings() -> None:
    logits = random_logits(6)
    mixed = rows(6)
    mixed.temperature[::2] = 0.0
    tokens, logprobs, raw = sample(logits, mixed, torch.zeros(6, dtype=torch.long))
    assert torch.equal(tokens[::2], logits.argmax(-1)[::2]) and not logprobs[::2].any()
    alone = [sample(logits[i : i + 1], mixed[torch.tensor([i])], torch.zeros(1, dtype=torch.long)) for i in range(6)]
    assert torch.equal(tokens, torch.cat([a[0] for a in alone])) and torch.equal(raw, torch.cat([a[2] for a in alone]))
    mixed.seed += 1000
    many = torch.cat([sample(logits, mixed, torch.full((6,), i))[0][1::2] for i in range(20)])
    assert len(many.unique()) > 5


def test_a_draw_depends_on_seed_and_place_only() -> None:
    seeds, places = torch.arange(-50, 50), torch.arange(100)
    assert torch.equal(uniform(seeds, places), uniform(seeds.flip(0), places.flip(0)).flip(0))
    grid = torch.stack([uniform(torch.full((200,), s), torch.arange(200)) for s in (0, 1, 2**62, -1)])
    assert grid.min() >= 0 and grid.max() < 1 and len(grid.unique()) == grid.numel()
    assert (grid.mean(-1) - 0.5).abs().max() < 0.08 and (grid.var(-1) - 1 / 12).abs().max() < 0.02
    shifted = torch.corrcoef(grid)  # neighbouring seeds are no copies of each other, shifted or not
    assert shifted.fill_diagonal_(0).abs().max() < 0.25
    assert torch.corrcoef(torch.stack((grid[0, 1:], grid[1, :-1])))[0, 1].abs() < 0.25


def test_a_hash_written_down_elsewhere_gives_the_same_numbers() -> None:
    """splitmix64 in plain integers: the published finaliser, in 64 bits that wrap."""

    def mix(z: int) -> int:
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return z ^ (z >> 31)

    for seed in (0, 1, 7, 2**40, -3):
        for i in (0, 1, 1000):
            want = (mix((mix(seed % 2**64) + (i + 1) * 0x9E3779B97F4A7C15) % 2**64) >> 11) * 2.0**-53
            assert uniform(torch.tensor([seed]), torch.tensor([i])).item() == want
