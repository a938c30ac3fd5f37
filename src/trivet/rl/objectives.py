"""Group-relative policy objectives as rows of one table; a row is five named choices.

    loss = mean over tokens t of sequences i of  -surrogate(r, A_i) + kl x k3

    ratio       token:    r = pi(t) / pi_old(t)
                sequence: r = (pi(o_i) / pi_old(o_i))^(1/|o_i|), one for all tokens (GSPO, 2507.18071)
    clip        none:     r A
                ppo:      min(r A, clip(r, 1-low, 1+high) A)
                cispo:    sg(min(r, 1+high)) A log pi: a capped weight without gradient (M1, 2506.13585)
    normaliser  token:    over all tokens of the batch alike (DAPO, 2503.14476)
                sequence: over the tokens of a sequence, then over sequences (GRPO, 2402.03300)
                constant: sum over tokens / (sequences x C) (Dr. GRPO, 2503.20783; RLOO has C = 1)
    kl          beta of k3 = pi_ref/pi - log(pi_ref/pi) - 1 >= 0; 0: none
    advantage   mean: R - mean R;  mean_std: (R - mean R) / std R;  leave_one_out: R - mean of the others

At r = 1 the gradient of every row is the plain policy gradient A grad log pi under its normaliser;
rows differ from the second update of a batch on, and by normaliser and advantage always.

PPO (1707.06347) without its critic is the clip of grpo, dr_grpo and dapo with the settings `epochs` and `minibatches`
(`epochs.py`), so it has no row. Before the first step every ratio is 1 and clip and cap do nothing.

The table is here, without torch, as plans and configs read it; what it means is computed in `loss.py`.

A token may have a weight of its own, without gradient (`scale`; for what, see epochs.py): it multiplies the surrogate,
not the KL term.

Tokens lie flat with the index of their sequence, so packed rows need no padding. Left out: critics,
token-level advantages, DAPO's soft length punishment (a matter of reward), dual clip.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from trivet.config import UserError, nearest, validate
from trivet.spec import Frozen

AdvantageKind = Literal["mean", "mean_std", "leave_one_out"]


class Objective(Frozen):
    """One row of the table."""

    ratio: Literal["token", "sequence"] = Field(default="token", description="what probability ratio is of")
    clip: Literal["none", "ppo", "cispo"] = Field(default="none", description="what bounds the ratio")
    low: float = Field(default=0.2, ge=0, le=1, description="ppo: the ratio counts down to 1 - low")
    high: float = Field(default=0.2, ge=0, description="ppo, cispo: the ratio counts up to 1 + high")
    normaliser: Literal["token", "sequence", "constant"] = Field(default="token", description="what is averaged")
    constant: float | None = Field(default=None, gt=0, description="C of 'constant'; unset: the token budget")
    kl: float = Field(default=0.0, ge=0, description="beta of the k3 penalty against the starting model")
    advantage: AdvantageKind = Field(default="mean", description="how a reward is compared with its group's")


# Values as published. CISPO's cap is not: 4 makes it 5, as in ScaleRL. Dr. GRPO's C is the budget.
# GSPO's range was chosen for thoughts of thousands of tokens: on thoughts of 20 it learnt slowly, and a hundred times
# the range as fast as DAPO (docs/RESULTS.md 11).
OBJECTIVES: dict[str, Objective] = {
    "reinforce": Objective(normaliser="constant", constant=1, advantage="mean"),
    "rloo": Objective(normaliser="constant", constant=1, advantage="leave_one_out"),
    "grpo": Objective(clip="ppo", low=0.2, high=0.2, normaliser="sequence", kl=0.04, advantage="mean_std"),
    "dr_grpo": Objective(clip="ppo", low=0.2, high=0.2, normaliser="constant", advantage="mean"),
    "dapo": Objective(clip="ppo", low=0.2, high=0.28, normaliser="token", advantage="mean_std"),
    "cispo": Objective(clip="cispo", high=4.0, normaliser="token", advantage="mean_std"),
    "gspo": Objective(ratio="sequence", clip="ppo", low=3e-4, high=4e-4, normaliser="sequence", advantage="mean_std"),
}


def find_objective(name: str, overrides: Mapping[str, Any] | None = None) -> Objective:
    """The row `name` with some choices changed. UserError for an unknown name or choice."""
    if name not in OBJECTIVES:
        hint = nearest(name, OBJECTIVES)
        raise UserError(f"objective {name!r} is not one of {', '.join(OBJECTIVES)}.{hint}")
    return validate({**OBJECTIVES[name].model_dump(), **(overrides or {})}, Objective, f"objective {name!r}")
