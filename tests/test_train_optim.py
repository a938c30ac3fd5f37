"""Muon against a plain loop over matrices, AdamW against torch's, and the learning rate."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from trivet.config import UserError
from trivet.train import optim
from trivet.train.optim import Optimizer, clip, newton_schulz, orthogonalize, schedule

SHAPES = [(12, 8), (8, 12), (12, 8), (6, 6), (3, 12, 8), (2, 5, 12, 8), (1, 7)]


def parameters(shapes: list[tuple[int, ...]], seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {f"p{i}": torch.randn(s, generator=g).requires_grad_() for i, s in enumerate(shapes)}


def set_gradients(params: dict[str, Tensor], step: int) -> None:
    g = torch.Generator().manual_seed(100 + step)
    for p in params.values():
        p.grad = torch.randn(p.shape, generator=g)


def plain_muon(params: dict[str, Tensor], steps: int, lr: float, decay: float) -> None:
    """Keller Jordan's loop, one matrix at a time."""
    momenta = {name: torch.zeros_like(p) for name, p in params.items()}
    for step in range(steps):
        set_gradients(params, step)
        for name, p in params.items():
            assert p.grad is not None
            matrices = zip(
                p.data.reshape(-1, *p.shape[-2:]),
                p.grad.reshape(-1, *p.shape[-2:]),
                momenta[name].view(-1, *p.shape[-2:]),
                strict=True,
            )
            for w, g, m in matrices:
                m.lerp_(g, 0.05)
                x = g.lerp(m, 0.95)
                tall = x.shape[0] > x.shape[1]
                x = x.T if tall else x
                x = x / (x.norm() + 1e-7)
                for _ in range(5):
                    a = x @ x.T
                    x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
                x = x.T if tall else x
                w.mul_(1 - lr * decay)
                w.sub_(lr * max(1, w.shape[0] / w.shape[1]) ** 0.5 * x)


def check_muon() -> None:
    mine, reference = parameters(SHAPES), parameters(SHAPES)
    optimizer = Optimizer({"matrices": mine, "others": {}}, muon_lr=0.05, weight_decay=0.1)
    for step in range(4):
        set_gradients(mine, step)
        optimizer.step(0.5)
    plain_muon(reference, 4, lr=0.025, decay=0.1)
    for name in mine:
        torch.testing.assert_close(mine[name], reference[name], rtol=1e-4, atol=2e-5)


def test_batched_muon_equals_one_matrix_at_a_time() -> None:
    check_muon()


@pytest.mark.parametrize("most", [1, 100, 2 * 96, 5 * 96, 2**24])
def test_stacks_hold_what_they_may_and_change_nothing(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes of 96 numbers: 16 matrices of one shape, some of them in one parameter."""
    sizes, right = [], optim.newton_schulz
    monkeypatch.setitem(optim.STACK, "cpu", most)
    monkeypatch.setattr(optim, "newton_schulz", lambda x: (sizes.append(x.numel()), right(x))[1])
    check_muon()
    assert max(sizes) == {1: 96, 100: 96, 192: 192, 480: 480}.get(most, 16 * 96)


def test_matrices_may_lie_in_memory_as_they_like() -> None:
    made = parameters([(5, 2, 8, 12), (3, 12, 8)])
    turned = {"p0": made["p0"].detach().transpose(0, 1), "p1": made["p1"].detach().mT}
    alike = {name: p.contiguous() for name, p in turned.items()}
    assert not any(p.is_contiguous() for p in turned.values())
    before = {name: p.clone() for name, p in alike.items()}
    for params in (turned, alike):
        set_gradients({name: p.requires_grad_() for name, p in params.items()}, 0)
        Optimizer({"matrices": params, "others": {}}).step()
    for name in turned:
        torch.testing.assert_close(turned[name], alike[name])
        assert float((turned[name] - before[name]).detach().abs().mean()) > 1e-4


def test_a_stack_that_is_cut_in_a_matrix_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin: half of a matrix made orthogonal is not half of the orthogonal matrix."""
    right = optim.matrices
    monkeypatch.setattr(optim, "matrices", lambda x: [half for part in right(x) for half in part.split(4, 1)])
    with pytest.raises(AssertionError):
        check_muon()


@pytest.mark.parametrize("wrong", [(3.4445, -4.7750, 2.03), (3.44, -4.7750, 2.0315)])
def test_a_wrong_coefficient_is_noticed(wrong: tuple[float, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optim, "NEWTON_SCHULZ", wrong)
    with pytest.raises(AssertionError):
        check_muon()


def test_mixed_up_matrices_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin of batching: results handed back to the wrong matrices of a bucket."""
    right = optim.newton_schulz
    monkeypatch.setattr(optim, "newton_schulz", lambda x: right(x).flip(0))
    with pytest.raises(AssertionError):
        check_muon()


def test_newton_schulz_flattens_singular_values() -> None:
    x = torch.randn(16, 24, 40, generator=torch.Generator().manual_seed(0))
    before, after = torch.linalg.svdvals(x), torch.linalg.svdvals(newton_schulz(x))
    assert (before.amax(-1) / before.amin(-1)).min() > 5
    assert 0.6 < after.min() and after.max() < 1.25
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    cosine = torch.nn.functional.cosine_similarity((u @ v).flatten(1), newton_schulz(x).flatten(1))
    assert cosine.min() > 0.98


def test_muon_does_not_care_about_the_size_of_gradients() -> None:
    updates = [torch.randn(1, 12, 8, generator=torch.Generator().manual_seed(0))]
    small = [updates[0] * 1e-3]
    torch.testing.assert_close(orthogonalize(small)[0], orthogonalize(updates)[0], rtol=2e-3, atol=2e-3)


def check_adamw(eps: float = 1e-8, betas: tuple[float, float] = (0.9, 0.95)) -> None:
    shapes: list[tuple[int, ...]] = [(7, 4), (9,), (3,), (2, 3, 4)]
    mine, theirs = parameters(shapes), parameters(shapes)
    optimizer = Optimizer({"matrices": {}, "others": mine}, adam_lr=0.02, weight_decay=0.3, eps=eps, betas=betas)
    groups = [
        {"params": [p for p in theirs.values() if p.ndim >= 2], "weight_decay": 0.3},
        {"params": [p for p in theirs.values() if p.ndim < 2], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95), eps=1e-8)
    for step in range(6):
        set_gradients(mine, step)
        set_gradients(theirs, step)
        optimizer.step(0.5)
        reference.step()
    for name in mine:
        torch.testing.assert_close(mine[name], theirs[name], rtol=1e-6, atol=1e-7)


def test_adamw_equals_torch() -> None:
    check_adamw()


@pytest.mark.parametrize("wrong", [{"eps": 1e-3}, {"betas": (0.9, 0.951)}, {"betas": (0.89, 0.95)}])
def test_wrong_adamw_is_noticed(wrong: dict[str, float]) -> None:
    with pytest.raises(AssertionError):
        check_adamw(**wrong)  # type: ignore[arg-type]


def fresh(seed: int = 0) -> tuple[dict[str, Tensor], Optimizer]:
    params = parameters([(6, 4), (5,), (4, 4)], seed)
    groups = {"matrices": {"a": params["p0"], "c": params["p2"]}, "others": {"b": params["p1"]}}
    return params, Optimizer(groups)


def test_state_goes_on_exactly() -> None:
    params, optimizer = fresh()
    for step in range(3):
        set_gradients(params, step)
        optimizer.step()
    copies, other = fresh(seed=9)
    for p, copy in zip(params.values(), copies.values(), strict=True):
        copy.data.copy_(p.data)
    other.load_state_dict({name: t.clone() for name, t in optimizer.state_dict().items()})
    for step in range(3, 6):
        for one, optimizer_ in ((params, optimizer), (copies, other)):
            set_gradients(one, step)
            optimizer_.step()
    assert all(torch.equal(a, b) for a, b in zip(params.values(), copies.values(), strict=True))


def test_a_foreign_state_is_refused() -> None:
    _, optimizer = fresh()
    state = optimizer.state_dict()
    with pytest.raises(UserError, match="'mean.b' is missing"):
        optimizer.load_state_dict({n: t for n, t in state.items() if n != "mean.b"})
    with pytest.raises(UserError, match="'extra' is unexpected"):
        optimizer.load_state_dict(state | {"extra": torch.zeros(1)})
    with pytest.raises(UserError, match=r"'momentum.a' has shape \[2, 2\], this model needs \[6, 4\]"):
        optimizer.load_state_dict(state | {"momentum.a": torch.ones(2, 2)})


def test_a_parameter_without_gradient_stays() -> None:
    params, optimizer = fresh()
    set_gradients(params, 0)
    params["p0"].grad = None
    before = {name: p.detach().clone() for name, p in params.items()}
    optimizer.step()
    assert [bool((params[n] == before[n]).all()) for n in params] == [True, False, False]


def test_clip_is_the_norm_of_all_gradients_together() -> None:
    mine, theirs = parameters([(6, 4), (5,)]), parameters([(6, 4), (5,)])
    for most in (0.5, 1e9):
        set_gradients(mine, 0)
        set_gradients(theirs, 0)
        want = torch.nn.utils.clip_grad_norm_(theirs.values(), most)
        torch.testing.assert_close(clip(mine.values(), most), want)
        for name in mine:
            torch.testing.assert_close(mine[name].grad, theirs[name].grad)


@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_schedule(shape: str) -> None:
    def at(step: int) -> float:
        return schedule(step, 100, warmup=10, decay_share=0.4, final=0.1, shape=shape)  # type: ignore[arg-type]

    assert [at(s) for s in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    assert {at(s) for s in range(10, 61)} == {1.0}
    falling = [at(s) for s in range(60, 100)]
    assert falling == sorted(falling, reverse=True) and len(set(falling)) == 40
    assert at(80) == pytest.approx(0.55)  # half way between 1 and 0.1, in both shapes
    assert 0.1 < at(99) < 0.13
    quarter = 1 - 0.9 * 0.25 if shape == "linear" else 0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2
    assert at(70) == pytest.approx(quarter)


def test_schedule_without_settings_is_constant() -> None:
    assert {schedule(s, 7) for s in range(7)} == {1.0}


def test_all_parts_together_fit_a_map_that_neither_part_could_alone() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(64, 8, generator=g)
    y = x @ torch.randn(8, 4, generator=g) + torch.randn(4, generator=g)
    w, b = torch.zeros(4, 8, requires_grad=True), torch.zeros(4, requires_grad=True)
    optimizer = Optimizer({"matrices": {"w": w}, "others": {"b": b}}, muon_lr=0.2, adam_lr=0.1)
    first = last = 0.0
    for step in range(60):
        loss = ((x @ w.T + b - y) ** 2).mean()
        first, last = first or loss.item(), loss.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step(schedule(step, 60, decay_share=0.5))
    assert last < 0.02 * first
