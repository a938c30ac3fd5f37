"""The chunked head against plain logits, and how much memory it takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trivet.train import losses
from trivet.train.losses import Sets, head_loss, token_logprobs

Head = Callable[..., tuple[Tensor, Any]]


def inputs(n: int = 40, d: int = 12, v: int = 50, ignored: float = 0.3) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    hidden = torch.randn(n, d, generator=g).requires_grad_()
    weight = torch.randn(v, d, generator=g).requires_grad_()
    targets = torch.randint(v, (n,), generator=g)
    targets[torch.rand(n, generator=g) < ignored] = -100
    return hidden, weight, targets


def gradients(value: Tensor, *of: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(value, of))


def full_loss(hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int | None = None) -> tuple[Tensor, int]:
    loss = F.cross_entropy(hidden @ weight.T, targets, ignore_index=-100, reduction="sum")
    return loss, int((targets != -100).sum())


def full_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0, chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    logp = (hidden @ weight.T / temperature).log_softmax(-1)
    return logp.gather(-1, targets[:, None]).squeeze(-1), -(logp.exp() * logp).sum(-1)


def check_loss(head: Head, chunk: int | None) -> None:
    hidden, weight, targets = inputs()
    got, count = head(hidden, weight, targets, chunk=chunk)
    want, n = full_loss(hidden, weight, targets)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
    assert count == n
    # 0.37: the gradient must be scaled by what the loss is multiplied with afterwards
    for a, b in zip(gradients(got * 0.37, hidden, weight), gradients(want * 0.37, hidden, weight), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6)


def check_logprobs(logprobs: Head, chunk: int | None, temperature: float) -> None:
    hidden, weight, targets = inputs(ignored=0.0)
    a, b = torch.randn(2, len(targets), generator=torch.Generator().manual_seed(2))
    got = logprobs(hidden, weight, targets, temperature, chunk=chunk)
    want = full_logprobs(hidden, weight, targets, temperature)
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)
    g = gradients(got[0] @ a + got[1] @ b, hidden, weight)
    w = gradients(want[0] @ a + want[1] @ b, hidden, weight)
    for x, y in zip(g, w, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("chunk", [None, 1, 7, 1000])
def test_head_loss_equals_cross_entropy(chunk: int | None) -> None:
    check_loss(head_loss, chunk)


@pytest.mark.parametrize("chunk", [None, 7])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_token_logprobs_equal_log_softmax(chunk: int | None, temperature: float) -> None:
    check_logprobs(token_logprobs, chunk, temperature)


def test_a_lost_chunk_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin: skip the last chunk, in the loss and in the gradient only."""
    whole = losses._chunks

    def short(rows: int, vocab: int, chunk: int | None) -> Iterator[slice]:
        yield from list(whole(rows, vocab, chunk))[:-1]

    monkeypatch.setattr(losses, "_chunks", short)
    with pytest.raises(AssertionError):
        check_loss(head_loss, 7)
    with pytest.raises(AssertionError):
        check_logprobs(token_logprobs, 7, 1.0)


def test_a_wrong_gradient_is_noticed() -> None:
    def half(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        logp, entropy = token_logprobs(*args, **kwargs)
        return logp, entropy.detach() * 0.5 + entropy * 0.5

    with pytest.raises(AssertionError):
        check_logprobs(half, None, 1.0)


def test_no_gradient_without_grad() -> None:
    hidden, weight, targets = inputs()
    with torch.no_grad():
        loss, _ = head_loss(hidden, weight, targets)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, full_loss(hidden, weight, targets)[0].detach(), rtol=1e-6, atol=0)


def test_a_frozen_head_still_trains_the_rest() -> None:
    hidden, weight, targets = inputs()
    want = gradients(full_loss(hidden, weight, targets)[0], hidden)[0]
    got = gradients(head_loss(hidden, weight.detach(), targets)[0], hidden)[0]
    torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-6)


def test_nothing_to_learn_is_zero_with_zero_gradient() -> None:
    hidden, weight, targets = inputs()
    loss, count = head_loss(hidden, weight, torch.full_like(targets, -100))
    assert (loss.item(), count) == (0.0, 0)
    assert not any(g.any() for g in gradients(loss, hidden, weight))


def test_bfloat16_keeps_small_chunks() -> None:
    """The weight's gradient is summed over chunks in fp32: many chunks lose nothing."""
    hidden, weight, targets = inputs(n=600, ignored=0.0)
    h, w = (x.detach().bfloat16().requires_grad_() for x in (hidden, weight))
    one = gradients(head_loss(h, w, targets)[0], w)[0].float()
    many = gradients(head_loss(h, w, targets, chunk=2)[0], w)[0].float()
    torch.testing.assert_close(many, one, rtol=1e-2, atol=1e-2 * one.abs().max().item())


class Largest(TorchDispatchMode):
    """The most numbers that any tensor made inside holds."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if isinstance(t, Tensor):
                self.numel = max(self.numel, t.numel())
        return result


@contextmanager
def largest() -> Iterator[Largest]:
    with Largest() as mode:
        yield mode


@pytest.mark.parametrize("n", [2000, 4000])
def test_logits_never_exist_at_once(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "CHUNK", 2**16)
    hidden, weight, targets = inputs(n, d=4, v=3000, ignored=0.1)
    bound = max(2**16, hidden.numel(), weight.numel())
    with largest() as seen:
        head_loss(hidden, weight, targets)[0].backward()
    assert bound // 2 < seen.numel <= bound
    with largest() as seen:
        logp, entropy = token_logprobs(hidden, weight, targets.clamp_min(0))
        (logp.sum() + entropy.sum()).backward()
    assert bound // 2 < seen.numel <= bound
    with largest() as seen:  # the twin: the plain form is caught
        full_loss(hidden, weight, targets)[0].backward()
    assert seen.numel == n * 3000


# ------------------------------------------------------------------------------- drawn from a part of the vocabulary
def random_sets(targets: Tensor, v: int) -> tuple[Sets, Tensor]:
    """Sets of one to ten tokens around each target, as lists and as a mask [N,V]."""
    g = torch.Generator().manual_seed(4)
    mask = torch.zeros(len(targets), v, dtype=torch.bool)
    for n, y in enumerate(targets.tolist()):
        mask[n, torch.randperm(v, generator=g)[: n % 10]] = True
        mask[n, y] = True
    return Sets(mask.nonzero()[:, 1], torch.tensor([0, *mask.sum(1).cumsum(0)])), mask


@pytest.mark.parametrize("chunk", [None, 7])
def test_token_logprobs_over_sets_are_those_of_a_masked_softmax(chunk: int | None) -> None:
    hidden, weight, targets = (
        x.double().detach().requires_grad_() if x.is_floating_point() else x for x in inputs(ignored=0.0)
    )
    hidden32, weight32 = (x.detach().float().requires_grad_() for x in (hidden, weight))
    sets, mask = random_sets(targets, len(weight))
    z = (hidden @ weight.T / 0.7).masked_fill(~mask, float("-inf"))
    p = z.softmax(-1)
    want = p.gather(-1, targets[:, None]).squeeze(-1).log(), torch.special.entr(p).sum(-1)
    got = token_logprobs(hidden32, weight32, targets, 0.7, chunk, sets)
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-5, atol=1e-6)
    a = torch.linspace(-1, 1, len(targets))
    inside = torch.where(mask, p, 1.0)  # entr has no finite gradient at 0
    entropy = -(p * inside.log()).sum(-1)
    for x, y in zip(gradients(got[0] @ a + got[1] @ a.flip(0), hidden32, weight32),
                    gradients(want[0] @ a.double() + entropy @ a.flip(0).double(), hidden, weight), strict=True):  # fmt: skip
        torch.testing.assert_close(x.double(), y, rtol=1e-4, atol=2e-5)
    whole = token_logprobs(hidden32, weight32, targets, 0.7, chunk)  # the twin: without the sets both are others
    assert all((x - y).abs().max() > 0.1 for x, y in zip(got, whole, strict=True))
    assert (got[0][mask.sum(1) == 1] == 0).all() and (got[1][mask.sum(1) == 1] == 0).all()


def test_the_gradient_over_sets_is_that_of_finite_differences() -> None:
    hidden, weight, targets = inputs(6, 3, 12, ignored=0.0)
    sets, _ = random_sets(targets, 12)

    def value(h: Tensor, w: Tensor) -> Tensor:
        logp, entropy = token_logprobs(h, w, targets, 0.9, 4, sets)
        return (logp * torch.arange(6)).sum() + 2 * entropy.sum()

    for x, gradient in zip((hidden, weight), gradients(value(hidden, weight), hidden, weight), strict=True):
        for at in [(0, 0), (3, 2), (5, 1)]:
            step = torch.zeros_like(x)
            step[at] = 1e-2
            pair = [(hidden + s, weight) if x is hidden else (hidden, weight + s) for s in (step, -step)]
            difference = (value(*pair[0]) - value(*pair[1])).item() / 2e-2
            assert gradient[at].item() == pytest.approx(difference, rel=2e-2, abs=2e-3)
