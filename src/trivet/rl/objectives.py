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

A token may have a weight of its own, without gradient (`scale`; for what, see epochs.py): it multiplies the surrogate,
not the KL term.

Tokens lie flat with the index of their sequence, so packed rows need no padding. Left out: critics,
token-level advantages, DAPO's soft length punishment (a matter of reward), dual clip.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

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


# ---------------------------------------------------------------------------------------- advantages
def advantages(rewards: Tensor, ok: Tensor, kind: AdvantageKind) -> tuple[Tensor, Tensor]:
    """rewards, ok [P,G] -> advantages [P,G] and spread [P], False where a group teaches nothing.

    Only rewards that are ok count, for the mean too; all others get advantage 0. std is the
    population's. A group without spread (or with fewer than two ok) gets 0 throughout.
    """
    count = ok.sum(1, keepdim=True)  # [P,1]
    kept = torch.where(ok, rewards, 0.0)
    mean = kept.sum(1, keepdim=True) / count.clamp_min(1)
    apart = torch.where(ok, rewards - mean, 0.0)
    high = torch.where(ok, rewards, -torch.inf).amax(1)
    low = torch.where(ok, rewards, torch.inf).amin(1)
    spread = (count[:, 0] >= 2) & (high > low)  # exact, unlike a comparison of the std with 0
    if kind == "mean_std":
        std = (apart.square().sum(1, keepdim=True) / count.clamp_min(1)).sqrt()
        apart = apart / torch.where(spread[:, None], std, 1.0)
    elif kind == "leave_one_out":
        apart = apart * count / (count - 1).clamp_min(1)
    return torch.where(spread[:, None], apart, 0.0), spread


# ---------------------------------------------------------------------------------------------- loss
@dataclass(frozen=True)
class Totals:
    """What the whole batch holds, when a call sees only a part of it. Sequences are never cut."""

    tokens: int
    sequences: int


def policy_loss(
    objective: Objective,
    logp: Tensor,
    logp_old: Tensor,
    advantage: Tensor,
    sequence: Tensor,
    mask: Tensor,
    *,
    logp_ref: Tensor | None = None,
    entropy: Tensor | None = None,
    scale: Tensor | None = None,
    totals: Totals | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss to minimise and its metrics, of tokens [N] that belong to sequences 0..S-1.

    advantage [S]; sequence [N] int64; mask [N] bool, True where the model wrote the token; scale [N].
    The loss and all metrics but ratio_max_abs_log (a maximum) are sums over these tokens divided by
    `totals`, so that those of a batch's parts add up to those of the batch.
    """
    real = mask.to(logp.dtype)
    lengths = torch.zeros_like(advantage, dtype=logp.dtype).index_add(0, sequence, real)  # [S]
    if totals is None:
        totals = Totals(int(mask.sum()), int((lengths > 0).sum()))
    weight = real * _weights(objective, lengths, totals)[sequence]  # [N]

    change = torch.where(mask, logp - logp_old, 0.0)
    log_ratio = change
    if objective.ratio == "sequence":
        mean = torch.zeros_like(lengths).index_add(0, sequence, change) / lengths.clamp_min(1)
        log_ratio = mean[sequence]
    surrogate, clipped = _surrogate(objective, log_ratio.exp(), advantage[sequence], logp)
    loss = -(weight * (surrogate if scale is None else scale * surrogate)).sum()
    share = real / max(totals.tokens, 1)
    metrics = {
        "clip_share": (share * clipped).sum(),
        "ratio_max_abs_log": change.detach().abs().max() if len(change) else change.new_zeros(()),
    }
    if objective.kl > 0:
        if logp_ref is None:
            raise ValueError("an objective with a KL term needs logp_ref")
        away = torch.where(mask, logp_ref - logp, 0.0)
        k3 = away.exp() - away - 1
        loss = loss + objective.kl * (weight * k3).sum()
        metrics["kl"] = (share * k3.detach()).sum()
    if entropy is not None:
        metrics["entropy"] = (share * entropy.detach()).sum()
    return loss, metrics


def _weights(objective: Objective, lengths: Tensor, totals: Totals) -> Tensor:
    """[S]: what one token of each sequence weighs."""
    if objective.normaliser == "token":
        return torch.full_like(lengths, 1 / max(totals.tokens, 1))
    if objective.normaliser == "sequence":
        return 1 / (lengths.clamp_min(1) * max(totals.sequences, 1))
    if objective.constant is None:
        raise ValueError("the normaliser 'constant' needs objective.constant")
    return torch.full_like(lengths, 1 / (objective.constant * max(totals.sequences, 1)))


def _surrogate(objective: Objective, ratio: Tensor, advantage: Tensor, logp: Tensor) -> tuple[Tensor, Tensor]:
    """[N] what is maximised, and [N] True where the clip rule changed it."""
    if objective.clip == "none":
        return ratio * advantage, torch.zeros_like(ratio, dtype=torch.bool)
    top = 1 + objective.high
    if objective.clip == "cispo":
        return ratio.detach().clamp(max=top) * advantage * logp, (ratio > top) & (advantage != 0)
    free, bound = ratio * advantage, ratio.clamp(1 - objective.low, top) * advantage
    return torch.minimum(free, bound), bound < free
