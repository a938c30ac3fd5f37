"""Every objective against numbers worked by hand, and the identities that must hold between them.

The example: two sequences of three tokens, the second with a tool token in the middle (masked).

    sequence 0, A = 2:    r = 1.5, 1, 0.5     log pi = -1, -2, -3
    sequence 1, A = -1:   r = 0.5, -, 2       log pi = -1, -, -0.5
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from trivet.config import UserError
from trivet.rl.loss import Totals, advantages, policy_loss
from trivet.rl.objectives import OBJECTIVES, Objective, find_objective

SEQUENCE = torch.tensor([0, 0, 0, 1, 1, 1])
MASK = torch.tensor([True, True, True, True, False, True])
RATIO = torch.tensor([1.5, 1.0, 0.5, 0.5, 7.0, 2.0], dtype=torch.float64)
LOGP = torch.tensor([-1.0, -2.0, -3.0, -1.0, -9.0, -0.5], dtype=torch.float64)
ADVANTAGE = torch.tensor([2.0, -1.0], dtype=torch.float64)


def loss_of(
    objective: Objective, ratio: Tensor = RATIO, **more: Tensor | Totals
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """loss, metrics, and the gradient by logp."""
    logp = LOGP.clone().requires_grad_()
    loss, metrics = policy_loss(objective, logp, LOGP - ratio.log(), ADVANTAGE, SEQUENCE, MASK, **more)  # type: ignore[arg-type]
    (gradient,) = torch.autograd.grad(loss, logp)
    return loss.detach(), metrics, gradient


def row(name: str, **changes: object) -> Objective:
    return find_objective(name, {"constant": 4} | changes if name == "dr_grpo" else changes)


K3 = 2 - math.log(2) - 1  # at pi_ref / pi = 2 everywhere
BY_HAND = {
    # r A: 3 + 2 + 1 = 6 and -0.5 - 2 = -2.5; over 2 sequences: 3.5 / 2
    "reinforce": (-1.75, 0 / 5),
    "rloo": (-1.75, 0 / 5),
    # clipped at 0.8 and 1.2: 2.4 + 2 + 1 = 5.4, mean 1.8; -0.8 - 2 = -2.8, mean -1.4; (1.8 - 1.4) / 2 = 0.2
    "grpo": (-0.2 + 0.04 * K3, 2 / 5),
    # the same sums over C = 4: (5.4 - 2.8) / (2 x 4)
    "dr_grpo": (-0.325, 2 / 5),
    # clipped at 0.8 and 1.28: 2.56 + 2 + 1 = 5.56 and -2.8; over 5 tokens: 2.76 / 5
    "dapo": (-0.552, 2 / 5),
    # nothing reaches 5: 1.5 2 (-1) + 1 2 (-2) + 0.5 2 (-3) = -10; -0.5 (-1) - 2 (-0.5) = 1.5; -8.5 / 5
    "cispo": (1.7, 0 / 5),
    # s0 = 0.75^(1/3), not below 1 - 3e-4 from the harmful side; s1 = (0.5 x 2)^(1/2) = 1: (2 s0 - 1) / 2
    "gspo": (-(2 * 0.75 ** (1 / 3) - 1) / 2, 0 / 5),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_by_hand(name: str) -> None:
    loss, metrics, _ = loss_of(row(name), logp_ref=LOGP + math.log(2))
    expected, clipped = BY_HAND[name]
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    assert metrics["clip_share"].item() == pytest.approx(clipped)
    assert metrics["ratio_max_abs_log"].item() == pytest.approx(math.log(2))  # the masked 7 does not count
    if name == "grpo":
        assert metrics["kl"].item() == pytest.approx(K3)


def test_a_wrong_bound_is_noticed() -> None:
    """The twin: move one published number and the worked example no longer holds."""
    for name, change in (("grpo", {"low": 0.3}), ("dapo", {"high": 0.2}), ("gspo", {"ratio": "token"})):
        loss, _, _ = loss_of(row(name, **change), logp_ref=LOGP + math.log(2))
        assert abs(loss.item() - BY_HAND[name][0]) > 1e-3, name


def test_cispo_caps_the_weight_and_gives_it_no_gradient() -> None:
    # cap 1.4: 1.4 2 (-1) - 4 - 3 = -9.8; 0.5 + 1.4 (-1)(-0.5) = 1.2; -8.6 / 5
    loss, metrics, gradient = loss_of(row("cispo", high=0.4))
    assert loss.item() == pytest.approx(1.72)
    assert metrics["clip_share"].item() == pytest.approx(2 / 5)
    capped = RATIO.clamp(max=1.4) * MASK
    by_token = ADVANTAGE[SEQUENCE]
    torch.testing.assert_close(gradient, -capped * by_token / 5)  # also where it is capped: no token is lost

    logp = LOGP.clone().requires_grad_()  # the twin: a weight that carries gradient gives another one
    leaky = -((logp - (LOGP - RATIO.log())).exp().clamp(max=1.4) * by_token * logp * MASK).sum() / 5
    (other,) = torch.autograd.grad(leaky, logp)
    assert (other - gradient).abs().max() > 0.1


def test_ppo_clip_stops_the_gradient_only_on_the_side_that_would_overshoot() -> None:
    _, _, gradient = loss_of(row("dapo"))
    # A > 0 and r = 1.5: stopped; r = 0.5: goes on. A < 0 and r = 0.5: stopped; r = 2: goes on
    assert gradient.tolist() == pytest.approx([0, -1 * 2 / 5, -0.5 * 2 / 5, 0, 0, 2 * 1 / 5])


@pytest.mark.parametrize("name", OBJECTIVES)
def test_at_ratio_one_the_gradient_is_the_policy_gradient(name: str) -> None:
    objective = row(name, kl=0)
    _, metrics, gradient = loss_of(objective, torch.ones_like(RATIO))
    weight = {
        "token": torch.full((6,), 1 / 5),
        "sequence": torch.tensor([1 / 3, 1 / 3, 1 / 3, 1 / 2, 0, 1 / 2]) / 2,
        "constant": torch.full((6,), 1 / (2 * (objective.constant or 1))),
    }[objective.normaliser].double()
    torch.testing.assert_close(gradient, -weight * MASK * ADVANTAGE[SEQUENCE])
    assert metrics["ratio_max_abs_log"] == 0


def test_normalisers_differ() -> None:
    """The twin: with the wrong normaliser the gradient above is another."""
    gradients = [
        loss_of(Objective(normaliser=n, constant=4), torch.ones_like(RATIO))[2]  # type: ignore[arg-type]
        for n in ("token", "sequence", "constant")
    ]
    for i in range(3):
        assert (gradients[i] - gradients[i - 1]).abs().max() > 0.01


@pytest.mark.parametrize("name", OBJECTIVES)
def test_parts_of_a_batch_add_up(name: str) -> None:
    objective = row(name)
    ref = LOGP + 0.3
    whole, metrics, _ = loss_of(objective, logp_ref=ref, entropy=-LOGP)

    def part(which: Tensor, totals: Totals | None) -> tuple[Tensor, dict[str, Tensor]]:
        own = SEQUENCE[which] - SEQUENCE[which].min()  # sequences are numbered anew in each part
        return policy_loss(
            objective, LOGP[which], (LOGP - RATIO.log())[which], ADVANTAGE[SEQUENCE[which].unique()], own, MASK[which],
            logp_ref=ref[which], entropy=-LOGP[which], totals=totals,
        )  # fmt: skip

    halves = [part(SEQUENCE == i, Totals(tokens=5, sequences=2)) for i in range(2)]
    torch.testing.assert_close(halves[0][0] + halves[1][0], whole)
    for key in metrics.keys() - {"ratio_max_abs_log"}:
        torch.testing.assert_close(halves[0][1][key] + halves[1][1][key], metrics[key])
    twin = [part(SEQUENCE == i, None)[0] for i in range(2)]  # each part with its own divisor
    assert (twin[0] + twin[1] - whole).abs() > 0.01


def test_advantages_by_hand() -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 9.0], [0.0, 3.0, 0.0, 9.0]])
    ok = torch.tensor([[True] * 4, [True, True, True, False], [True, True, True, False]])
    mean, spread = advantages(rewards, ok, "mean")
    assert spread.tolist() == [True, False, True]  # group 1: the 9 is not ok, the rest agree
    assert mean.tolist() == [[0.5, -0.5, -0.5, 0.5], [0] * 4, [-1, 2, -1, 0]]
    scaled, _ = advantages(rewards, ok, "mean_std")
    # std of 1001 is 0.5; of 0 3 0 it is sqrt(6/3)
    assert scaled[0].tolist() == [1, -1, -1, 1]
    assert scaled[2].tolist() == pytest.approx([-1 / math.sqrt(2), math.sqrt(2), -1 / math.sqrt(2), 0])
    others, _ = advantages(rewards, ok, "leave_one_out")
    assert others[0].tolist() == pytest.approx([1 - 1 / 3, -2 / 3, -2 / 3, 1 - 1 / 3])  # minus the mean of the others
    assert others[2].tolist() == pytest.approx([0 - 1.5, 3 - 0, 0 - 1.5, 0])


def test_one_ok_answer_is_no_group() -> None:
    ok = torch.tensor([[True, False, False]])
    for kind in ("mean", "mean_std", "leave_one_out"):
        got, spread = advantages(torch.tensor([[1.0, 0.0, 0.0]]), ok, kind)  # type: ignore[arg-type]
        assert not spread.any() and got.tolist() == [[0, 0, 0]]
    _, spread = advantages(torch.tensor([[1.0, 0.0, 0.0]]), torch.ones(1, 3, dtype=torch.bool), "mean")
    assert spread.all()  # the twin: with all of them ok it is one


def test_equal_rewards_have_no_spread_whatever_their_rounding() -> None:
    rewards = torch.full((1, 7), 0.1)  # the mean of seven 0.1 is not 0.1 in fp32
    _, spread = advantages(rewards, torch.ones(1, 7, dtype=torch.bool), "mean_std")
    assert not spread.any()


def test_user_errors_name_the_nearest() -> None:
    with pytest.raises(UserError, match="Did you mean 'grpo'"):
        find_objective("grppo")
    with pytest.raises(UserError, match="Did you mean 'normaliser'"):
        find_objective("grpo", {"normalizer": "token"})
    with pytest.raises(UserError, match="clip"):
        find_objective("grpo", {"clip": "pppo"})
