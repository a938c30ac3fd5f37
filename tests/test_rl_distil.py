"""Distillation: the divergence and its gradient against autograd, learning, and exact resumption."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from test_rl_learner import CHAT, Digits, make
from trivet.config import UserError
from trivet.rl.distil import DistilConfig, distil, token_kl
from trivet.train.loop import Interrupted

TASKS = [(Digits(), 1.0)]


def plain(
    hidden: torch.Tensor, weight: torch.Tensor, goal: torch.Tensor, goal_weight: torch.Tensor, kind: str
) -> torch.Tensor:
    """torch's own, all logits at once."""
    p, q = (hidden @ weight.T).log_softmax(-1), (goal @ goal_weight.T).log_softmax(-1)
    a, b = (q, p) if kind == "reverse" else (p, q)
    return F.kl_div(a, b, log_target=True, reduction="none").sum(-1)


@pytest.mark.parametrize("kind", ["reverse", "forward"])
@pytest.mark.parametrize("chunk", [None, 3])
def test_divergence_and_gradient_are_those_of_autograd(kind: Any, chunk: int | None) -> None:
    g = torch.Generator().manual_seed(0)
    hidden, goal = (torch.randn(7, d, generator=g, dtype=torch.float64) for d in (5, 4))
    weight, goal_weight = (torch.randn(11, d, generator=g, dtype=torch.float64) for d in (5, 4))
    up = torch.randn(7, generator=g, dtype=torch.float64)
    found = []
    for function in (
        lambda h, w: token_kl(h, w, goal, goal_weight, kind, chunk),
        lambda h, w: plain(h, w, goal, goal_weight, kind),
    ):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        values = function(h, w)
        (values.double() * up).sum().backward()
        found.append((values.double(), h.grad, w.grad))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    other = plain(hidden, weight, goal, goal_weight, "forward" if kind == "reverse" else "reverse")
    assert (found[0][0] - other).abs().max() > 0.1  # the two directions are told apart


def settings(**more: Any) -> DistilConfig:
    given = {
        "steps": 6, "answers": 16, "max_tokens": 8, "rows": 8, "length": 32, "muon_lr": 0.02, "adam_lr": 0.01,
        "tensorboard": False,
    }  # fmt: skip
    return DistilConfig.model_validate(given | more)


def noisy(seed: int) -> Any:
    model = make()
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=g))
    return model


@pytest.mark.parametrize("writer", ["student", "teacher"])
def test_a_student_comes_close_to_its_teacher(writer: str, tmp_path: Path) -> None:
    student, teacher = noisy(1), noisy(2)
    kls: list[float] = []
    distil(
        student,
        teacher,
        CHAT,
        TASKS,
        settings(steps=25, writer=writer),
        tmp_path,
        progress=lambda m: kls.append(m["kl"]),
    )
    assert sum(kls[-3:]) < 0.7 * sum(kls[:3])
    again: list[float] = []
    same = noisy(1)
    distil(same, noisy(1), CHAT, TASKS, settings(steps=1), tmp_path / "same", progress=lambda m: again.append(m["kl"]))
    assert abs(again[0]) < 1e-6 < kls[0]  # nothing to learn from itself


def test_stopped_and_resumed_it_ends_with_the_same_bits(tmp_path: Path) -> None:
    whole = noisy(1)
    distil(whole, noisy(2), CHAT, TASKS, settings(), tmp_path / "whole")

    def stop(metrics: dict[str, Any]) -> None:
        if metrics["step"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        distil(noisy(1), noisy(2), CHAT, TASKS, settings(save_every_seconds=0), tmp_path / "cut", progress=stop)
    resumed = noisy(1)
    distil(resumed, noisy(2), CHAT, TASKS, settings(save_every_seconds=0), tmp_path / "cut")
    other = noisy(1)
    distil(other, noisy(2), CHAT, TASKS, settings(seed=1), tmp_path / "other")
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    assert any(not torch.equal(t, other.state_dict()[n]) for n, t in whole.state_dict().items())


def test_another_teacher_is_another_run(tmp_path: Path) -> None:
    distil(noisy(1), noisy(2), CHAT, TASKS, settings(steps=1), tmp_path)
    with pytest.raises(UserError, match="teacher"):
        distil(noisy(1), noisy(3), CHAT, TASKS, settings(steps=1), tmp_path)
