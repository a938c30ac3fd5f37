"""The optimizer steps on one batch of episodes.

    for each epoch, for each minibatch:   one step on the objective of  r = pi / pi_old

Which ratio is which. Two forward passes give log-probabilities of a sampled token: the engine's, token
by token with a cache, and the trainer's, over packed rows. They are the same module and the same
weights, but sum in another order, so they differ by rounding. The objective's importance ratio is
about *weights*: its denominator pi_old is the trainer's own forward at the weights that sampled. Of the first
minibatch that is the forward of its own first update (where the ratio is then exactly 1; anything else is a bug
and stops the run), so a single update on a whole batch costs no further pass; of the others it is a pass
without gradient before the first update. The difference between engine and trainer is *not* part of that ratio:
it is measured apart (`mismatch/*`: k3 estimate of KL(engine || trainer), Pearson's correlation of the two
probabilities of a token, as MiniMax-M1 reports it, 2506.13585), and a run
stops when it exceeds what rounding explains, because then one of the two is wrong.

Where the engine is a server with other kernels, more than rounding is to be explained: an expectation over its
tokens is one over another policy's. `correction = "tis"` is truncated importance sampling (Yao et al. 2025, "Your
Efficient RL Framework Secretly Brings You Off-Policy RL Training"; the truncation: Ionides 2008). The surrogate of a
token is multiplied by

    w = min(pi_old(t) / pi_engine(t), cap), without gradient

so that what the engine likes better than the trainer counts less; the cap bounds the variance and leaves a bias. `tis/*`
are its mean and the share of tokens at the cap. Of stale tokens w is 1: their ratio's denominator is the engine's already.

Tokens of an episode that older weights sampled (`Row.stale`, see carry.py) have no such pass: the weights are gone. Their
denominator is the engine's log-probability, so that the objective's clip bounds how far off-policy they count, and
`stale/*` says how far the policy has moved from what sampled them. They count in none of the measures of fresh ones.

Where the sampler left tokens out (top_p, top_k, min_p), both probabilities, and the reference's, are over what
it left, token by token as it recorded it ("keep sampling mask", DeepSeek-V3.2, arXiv 2512.02556). With the whole
vocabulary in the denominator every ratio would be wrong by the mass that was cut.

With experts, a flipped choice is a change of the ratio that no weight explains. So choices are replayed, while the
gates, and their gradients, are the live router's: `trainer` replays from the second pass on what the first one
chose ("routing replay", GSPO, 2507.18071), `sampler` replays what the engine chose from the first pass on (R3,
2510.11370), for tokens that it computed for the episode itself; of the others (found in its prefix store, or
carried over from an earlier step) the trainer's first choice is replayed. `routing/agreement` is the share of its choices that the trainer's router shares.

Left out: shuffling between epochs (minibatches are the same in each, so what was recorded stays with its rows);
weights of whole sequences, and masking instead of truncating.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from trivet.agent.loop import Row
from trivet.config import UserError
from trivet.model import Routing, Transformer
from trivet.rl.config import RLConfig
from trivet.rl.loss import Totals, policy_loss
from trivet.rl.objectives import Objective
from trivet.rl.precision import head_products, products
from trivet.rl.reference import Reference
from trivet.rl.update import Packed, deal, pack, turns
from trivet.train.losses import token_logprobs
from trivet.train.optim import Optimizer, clip, schedule
from trivet.train.parallel import ALONE, Ranks
from trivet.train.parallel import clip as clip_parts


@dataclass
class Minibatch:
    """What one optimizer step learns from. parts count its sequences from 0, as advantage [S] does."""

    parts: list[Packed]
    advantage: Tensor
    totals: Totals
    idle: list[Packed] = field(default_factory=list)  # to go along with the other processes: see together.py


@dataclass
class Seen:
    """What the forward passes at the weights that sampled showed: of all of the batch, once they are through."""

    tokens: int = 0
    worst: float = 0.0  # largest |log pi_trainer - log pi_engine|
    k3: float = 0.0
    moments: Tensor = field(default_factory=lambda: torch.zeros(5, dtype=torch.float64))  # of p and q: see correlation
    stale_tokens: int = 0
    stale_k3: float = 0.0  # KL(what sampled them || the policy of now)
    shared: int = 0  # choices of experts that engine and trainer share
    choices: int = 0
    scaled: int = 0  # tokens that have a weight
    scale: float = 0.0  # the sum of the weights
    capped: int = 0

    @classmethod
    def over(cls, shares: Sequence[Seen]) -> Seen:
        """What all processes saw."""
        sums = {f.name: sum(getattr(share, f.name) for share in shares) for f in fields(cls)}
        return cls(**sums | {"worst": max(share.worst for share in shares)})

    def correct(self, scale: Tensor, cap: float) -> None:
        self.scaled += len(scale)
        self.scale += scale.double().sum().item()
        self.capped += int((scale >= cap).sum())

    def add(self, part: Packed, logp: Tensor, routing: Routing) -> None:
        away = (logp - part.sampler).double()  # k3 of a rounding error is far below fp32
        fresh = slice(None) if part.stale is None else ~part.stale
        p, q = logp[fresh].double().exp(), part.sampler[fresh].double().exp()
        self.moments += torch.stack((p.sum(), q.sum(), p @ p, q @ q, p @ q)).cpu()
        if part.stale is not None:
            moved, away = away[part.stale], away[~part.stale]
            self.stale_tokens += len(moved)
            self.stale_k3 += (moved.expm1() - moved).sum().item()
        self.tokens += len(away)
        self.worst = max(self.worst, away.abs().amax().item() if len(away) else 0.0)
        self.k3 += (away.expm1() - away).sum().item()
        for given, own in zip(routing.replay or [], routing.own, strict=True):
            known = given[given[..., 0] >= 0], own[given[..., 0] >= 0]  # [n,k] each
            self.shared += int((known[0].unsqueeze(-1) == known[1].unsqueeze(-2)).any(-1).sum())
            self.choices += known[0].numel()

    @property
    def correlation(self) -> float | None:
        """Pearson's, of a token's probability in trainer (p) and engine (q); None where one of them never differs."""
        p, q, pp, qq, pq = (self.moments / max(self.tokens, 1)).tolist()
        spread = (pp - p * p) * (qq - q * q)
        return (pq - p * q) / math.sqrt(spread) if spread > 1e-24 else None

    @property
    def metrics(self) -> dict[str, float]:
        values = {"mismatch/max_abs_log": self.worst, "mismatch/kl": self.k3 / max(self.tokens, 1)}
        if self.correlation is not None:
            values["mismatch/correlation"] = self.correlation
        if self.stale_tokens:
            values |= {
                "stale/share": self.stale_tokens / (self.tokens + self.stale_tokens),
                "stale/kl": self.stale_k3 / self.stale_tokens,
            }
        if self.scaled:
            values |= {"tis/mean": self.scale / self.scaled, "tis/capped": self.capped / self.scaled}
        return values | ({"routing/agreement": self.shared / self.choices} if self.choices else {})


@dataclass
class Sums:
    """What one optimizer step adds up to over its microbatches."""

    metrics: dict[str, Tensor] = field(default_factory=dict)
    loads: list[Tensor] = field(default_factory=list)

    def add(self, metrics: dict[str, Tensor], loads: Sequence[Tensor]) -> None:
        for key, value in metrics.items():
            old = self.metrics.get(key, torch.zeros_like(value))
            self.metrics[key] = torch.maximum(old, value) if key == "ratio_max_abs_log" else old + value
        if loads:
            self.loads = [a + b for a, b in zip(self.loads, loads, strict=True)] if self.loads else list(loads)

    def cpu(self) -> Sums:
        return Sums({key: value.cpu() for key, value in self.metrics.items()}, [load.cpu() for load in self.loads])

    @classmethod
    def over(cls, shares: Sequence[Sums]) -> Sums:
        """Of all processes."""
        done = cls()
        for share in shares:
            done.add(share.metrics, share.loads)
        return done


class Updates:
    """Learns from batches. reference: of a KL term."""

    def __init__(
        self, model: Transformer, reference: Reference | None, objective: Objective, optimizer: Optimizer,
        config: RLConfig, device: torch.device | str, ranks: Ranks = ALONE,
    ):  # fmt: skip
        self.model, self.reference, self.objective = model, reference, objective
        self.optimizer, self.config, self.device, self.ranks = optimizer, config, torch.device(device), ranks

    def learn_from(self, rows: Sequence[Row], advantage: Tensor, step: int) -> dict[str, Any]:
        """All optimizer steps on a batch. Metrics are means over the first epoch's, the last ratio and clip share.

        Raises UserError where a number is not finite, or engine and trainer disagree.
        """
        c, mine = self.config, Seen()
        batches = [self.minibatch(rows, which, advantage) for which in deal(rows, c.minibatches)]
        for batch in batches[1:]:
            self.look(batch, mine)
        firsts: list[dict[str, float]] = []
        values: dict[str, Any] = {}
        for update in range(c.epochs * len(batches)):
            done, seen = self.summed(self.backward(batches[update % len(batches)], mine), mine)
            norm = self.clip().item()
            result = {key: value.item() for key, value in done.metrics.items()} | {"grad_norm": norm}
            if not all(math.isfinite(v) for v in (*result.values(), *seen.metrics.values())):
                raise UserError(
                    f"RL broke at step {step}: {result | seen.metrics}. Lower muon_lr or adam_lr; what was saved last is from before."
                )
            ratio = result.pop("ratio_max_abs_log")
            if update == 0:
                self.check_first(ratio, seen.metrics["mismatch/kl"], step)
                values = {"ratio/max_abs_log": ratio, **seen.metrics}
            if update < len(batches):
                firsts.append(result)
            self.optimizer.step(schedule(step, c.steps, decay_share=c.decay_share))
            self.optimizer.zero_grad()
            if done.loads:
                values["expert_load"] = max((load.max() / load.mean()).item() for load in done.loads)
        values |= {key: sum(result[key] for result in firsts) / len(firsts) for key in firsts[0]}
        if update:
            values |= {"updates": update + 1, "clip_share": result["clip_share"], "ratio/last_max_abs_log": ratio}
        return values

    def summed(self, done: Sums, seen: Seen) -> tuple[Sums, Seen]:
        """Add up the processes' shares of a minibatch: its gradients, in place, and what was measured."""
        self.optimizer.collect_gradients()
        if not self.optimizer.parts:  # else FSDP did
            self.ranks.sum_gradients(self.optimizer.parameters())
        sums, sights = zip(*self.ranks.gather((done.cpu(), seen)), strict=True)
        return Sums.over(sums), Seen.over(sights)

    def clip(self) -> Tensor:
        named, parts = self.optimizer.named(), self.optimizer.parts
        if parts:
            return clip_parts(named, parts, self.ranks, self.config.clip)
        return clip(named.values(), self.config.clip)

    def minibatch(self, rows: Sequence[Row], which: Sequence[int], advantage: Tensor) -> Minibatch:
        """This process's share of it, and what it holds as a whole."""
        c, chosen = self.config, [rows[i] for i in which]
        parts = pack(chosen, c.rows, c.length, c.share_prompts, self.ranks.rank, self.ranks.world)
        parts = [part.to(self.device) for part in parts]
        totals = Totals(sum(sum(row.trained) for row in chosen), len(which))
        batch = Minibatch(parts, advantage[list(which)].to(self.device), totals)
        if self.optimizer.parts:  # of the first process, which has the most
            idle = turns(chosen, c.rows, c.length, c.share_prompts, self.ranks.world) - len(parts)
            batch.idle = [part.to(self.device) for part in pack(chosen[:1], 1, c.length)] * idle
        return batch

    @torch.no_grad()
    def look(self, batch: Minibatch, seen: Seen) -> None:
        """Take the denominators of a minibatch's ratios while the weights are those that sampled."""
        for part in batch.parts:
            routing = Routing(replay=part.experts)
            self.note(part, self.logprobs(self.model, part, routing)[0], routing, seen)
        for part in batch.idle:
            self.logprobs(self.model, part, Routing())

    def note(self, part: Packed, logp: Tensor, routing: Routing, seen: Seen) -> None:
        """Keep what the first forward pass over a part gave, for later updates."""
        part.old = logp if part.stale is None else torch.where(part.stale, part.sampler, logp)
        seen.add(part, logp, routing)
        if self.config.corrects:
            part.scale = (part.old - part.sampler).exp().clamp(max=self.config.correction_cap)
            seen.correct(part.scale, self.config.correction_cap)
        if self.config.replay != "none":  # also where the engine's choice was not known
            part.experts = routing.experts or None
        if self.reference is not None:
            with torch.no_grad():
                part.reference = self.logprobs(self.reference, part, Routing())[0]

    def backward(self, batch: Minibatch, seen: Seen) -> Sums:
        """Add the gradient of a whole minibatch, microbatch by microbatch."""
        done = Sums()
        for part in batch.parts:
            routing = Routing(replay=part.experts)
            logp, entropy = self.logprobs(self.model, part, routing)
            if part.old is None:
                self.note(part, logp.detach(), routing, seen)
            assert part.old is not None
            loss, metrics = policy_loss(
                self.objective, logp, part.old, batch.advantage, part.sequence,
                torch.ones_like(part.sequence, dtype=torch.bool),
                logp_ref=part.reference, entropy=entropy, scale=part.scale, totals=batch.totals,
            )  # fmt: skip
            loss.backward()
            if part.stale is not None:
                fresh = (logp.detach() - part.old)[~part.stale].abs()
                metrics["ratio_max_abs_log"] = fresh.amax() if len(fresh) else fresh.new_zeros(())
            done.add(metrics | {"loss": loss.detach()}, routing.loads)
        for part in batch.idle:
            (0 * self.logprobs(self.model, part, Routing())[0].sum()).backward()
        return done

    def logprobs(self, model: Transformer | Reference, part: Packed, routing: Routing) -> tuple[Tensor, Tensor]:
        """log p and entropy [N] of the tokens that the model wrote, under the distribution they were drawn from."""
        c = self.config
        with products(c, self.device):
            hidden = model(part.tokens, part.positions, routing=routing, recompute=c.recompute, apart=part.apart)
            hidden = hidden[part.wanted]  # [N,D]
        with head_products(c, self.device):
            hidden = hidden.to(model.head_weight.dtype)
            return token_logprobs(hidden, model.head_weight, part.targets, c.temperature, sets=part.sets)

    def check_first(self, ratio: float, mismatch: float, step: int) -> None:
        if ratio != 0:
            raise RuntimeError(f"step {step}: the ratio of the first update is not 1 (|log| = {ratio}): a bug")
        if mismatch > self.config.most_mismatch:
            elsewhere = (
                " See that the server takes each step's weights, and gives log-probabilities at rl.temperature."
                if self.config.server is not None
                else ""
            )
            raise UserError(
                f"RL stopped at step {step}: engine and trainer disagree, KL = {mismatch:.2e} a token, more "
                f"than mismatch_limit = {self.config.most_mismatch:g}. One of the two forward passes is wrong; "
                f"if the model runs in a low precision, try fp32 or raise the limit.{elsewhere}"
            )
