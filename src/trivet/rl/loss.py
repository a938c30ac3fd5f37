"""Advantages and the loss of the rows of `objectives.py`, whose formulas are written down there."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trivet.rl.objectives import AdvantageKind, Objective


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
