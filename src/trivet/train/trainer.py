"""Pretraining and supervised fine-tuning: what a step is.

A step takes `accumulate` microbatches and adds up their gradients (`step.py`). Muon and AdamW update, then the
routers' biases move by the step's loads. What a run of steps is besides them is in `loop.py`.

On several processes (`parallel.py`) each computes its share of the rows; the sums are over all of them.
The data is a function of an index, so the place in it is one number.

Left out: dropout.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field

from trivet.model import Transformer
from trivet.model.experts import plain_name
from trivet.model.lora import training_flops_per_token
from trivet.spec import Free
from trivet.train.data import Batch, Documents, PackedBatches, share, stable_hash
from trivet.train.loop import Loop, Progress, RunConfig, identity_of
from trivet.train.nested import shortened
from trivet.train.offload import Where, make_optimizer
from trivet.train.optim import clip, schedule
from trivet.train.parallel import clip as clip_parts
from trivet.train.parallel import divide, ranks_of
from trivet.train.step import Divisors, Precision, StepSums, backward

TIMES = ("seconds", "tokens_per_second", "gflops", "mfu")  # metrics that differ from run to run


class TrainConfig(RunConfig):
    """How to train. Nothing here says on what."""

    rows: int = Field(gt=0, description="rows of a microbatch")
    length: int = Field(gt=0, description="token slots of a row; documents are packed into it")
    accumulate: int = Field(default=1, gt=0, description="microbatches of an optimizer step, on all processes together")
    shards: Free[int] = Field(
        default=0, ge=0, description="processes that divide the model (FSDP); 0: all that torchrun started"
    )
    expert_shards: Free[int] = Field(
        default=1, gt=0, description="divides experts further (EP): on shards x expert_shards processes"
    )
    overflow: Literal["error", "cut"] = Field(
        default="error", description="a document longer than a row: stop, or cut its end off and count"
    )
    muon_lr: float = Field(default=0.02, ge=0, description="learning rate of the matrices")
    adam_lr: float = Field(default=3e-3, ge=0, description="learning rate of everything else")
    weight_decay: float = Field(default=0.0, ge=0, description="decoupled; spares vectors")
    precision: Precision = Field(
        default="fp32", description="of products in the model; weights, optimizer and softmaxes stay fp32"
    )
    recompute: Free[bool] = Field(
        default=False,
        description="activation checkpointing: layers are computed again in the backward pass; less memory, a third more work",
    )
    offload: Free[Where] = Field(
        default="none",
        description="kept in host memory, where the step then happens: the optimizer, or each gradient too, see offload.py",
    )
    clip: float = Field(default=1.0, gt=0, description="largest norm of the gradient; inf: never clip")
    warmup: int = Field(default=0, ge=0, description="steps of linear warm-up")
    decay_share: float = Field(default=0.4, ge=0, le=1, description="last share of the run, in which the rate falls")
    decay: Literal["linear", "cosine"] = Field(default="linear", description="how it falls")
    final_lr: float = Field(default=0.0, ge=0, le=1, description="factor of the rate at the end")
    mtp_weight: float = Field(default=0.3, ge=0, description="weight of multi-token prediction, if the model has it")
    nested_rank: int = Field(
        default=0, ge=0, description="MLA: half of the steps keep a random rank of this or more; 0: all of the latents"
    )
    log_every: int = Field(default=1, gt=0, description="steps between lines of metrics")
    eval_every: int = Field(default=0, ge=0, description="steps between evaluations; 0: only at the end")


def train(
    model: Transformer,
    documents: Documents,
    config: TrainConfig,
    out: Path,
    *,
    progress: Progress | None = None,
    evaluate: Callable[[Transformer], dict[str, float]] | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Train `model` in place and return the last metrics. Resumes from `out`/resume if it is there.

    In a group of processes (`parallel.processes`) all call this; it leaves the model divided over them, and
    `parallel.gathered` makes it whole. `progress` is called in the first one only.
    `evaluate` must not depend on anything but the model. Raises Interrupted on Ctrl-C or SIGTERM,
    UserError where the data, the disk or the loss went wrong.
    """
    run = _Run(model, documents, config, Path(out), device)
    return run.loop.run(
        run.one_step, progress, evaluate=partial(evaluate, model) if evaluate else None, keep=run.keep,
        log_every=config.log_every, eval_every=config.eval_every,
    )  # fmt: skip


class _Run:
    """What steps depend on, and what is counted on the way."""

    def __init__(
        self, model: Transformer, documents: Documents, config: TrainConfig, out: Path, device: torch.device | str
    ):
        self.model, self.config, self.device = model, config, device
        self.ranks = ranks_of(config.shards, config.expert_shards)
        identity = {"train": config.identity(), **identity_of(model)}
        self.parts = divide(model, self.ranks, torch.device(device)) if self.ranks.world > 1 else {}
        if not self.parts:
            model.to(device)
        groups = {
            kind: {plain_name(name): p for name, p in table.items()} for kind, table in model.optimizer_groups().items()
        }
        self.optimizer = make_optimizer(
            config.offload, groups, config.muon_lr, config.adam_lr, config.weight_decay, self.parts
        )
        self.loop = Loop(model, self.optimizer, config, out, identity, ranks=self.ranks)
        kept = self.loop.kept or {"document": 0, "totals": {"tokens": 0, "targets": 0, "slots": 0, "cut": 0}}
        self.totals: dict[str, int] = kept["totals"]
        self.batches = PackedBatches(documents, config.rows, config.length, kept["document"], config.overflow)
        self.batches.cut = self.totals["cut"]
        self.peak = self.ranks.world * measure_peak(device, config.precision) if self.loop.writes else 0.0
        self.logged_at = time.perf_counter()
        self.flops_since_log = 0.0
        self.tokens_since_log = 0

    def one_step(self, step: int) -> Callable[[], dict[str, Any]]:
        config = self.config
        packed = [next(self.batches) for _ in range(config.accumulate)]
        batches = [batch.to(self.device) for batch in share(packed, self.ranks.rank, self.ranks.world)]
        of = Divisors.of(packed, self.model.spec.mtp)
        with shortened(self.model, config.nested_rank, stable_hash(config.seed, step, 1)):
            sums = backward(self.model, batches, config.mtp_weight, config.precision, config.recompute, of)
        loss, mtp, balance, *loads = self.ranks.sum([sums.loss, sums.mtp, sums.balance, *sums.loads])
        self.sums = StepSums(loss, mtp, balance, loads)
        self.optimizer.collect_gradients()
        if self.parts:
            self.norm = clip_parts(self.optimizer.named(), self.parts, self.ranks, config.clip)
        else:
            self.norm = clip(self.optimizer.parameters(), config.clip)
        self.rate = schedule(step, config.steps, config.warmup, config.decay_share, config.final_lr, config.decay)
        self.optimizer.step(self.rate)
        self.optimizer.zero_grad()
        self.model.update_router_bias(self.sums.loads)
        self._count(packed)
        return self.measured

    def keep(self, step: int) -> dict[str, Any]:
        return {"document": self.batches.state, "totals": self.totals}

    def _count(self, packed: Sequence[Batch]) -> None:
        filled = sum(batch.filled for batch in packed)
        self.totals["tokens"] += filled
        self.totals["targets"] += sum(batch.count for batch in packed)
        self.totals["slots"] += sum(batch.tokens.numel() for batch in packed)
        self.totals["cut"] = self.batches.cut
        context = round(sum(batch.context for batch in packed) / filled)  # mean; documents, not rows
        self.flops_since_log += filled * training_flops_per_token(self.model, 2 * context - 1)
        self.tokens_since_log += filled

    def measured(self) -> dict[str, Any]:
        """The metrics of the last step, and the speed since this was called before."""
        fastest = self.config.muon_lr if self.optimizer.matrices else self.config.adam_lr
        values: dict[str, Any] = {
            "loss": self.sums.loss.item(), "grad_norm": self.norm.item(), "lr": self.rate * fastest, **self.totals,
        }  # fmt: skip
        if self.model.spec.mtp:
            values["mtp_loss"] = self.sums.mtp.item()
        if self.sums.loads:
            values["balance"] = self.sums.balance.item()
            values["expert_load"] = max((load.max() / load.mean()).item() for load in self.sums.loads)
        now = time.perf_counter()
        spent = now - self.logged_at
        gflops = self.flops_since_log / spent / 1e9
        values |= {
            "tokens_per_second": self.tokens_since_log / spent,
            "gflops": gflops,
            "mfu": gflops / self.peak if self.peak else 0.0,
        }
        self.logged_at, self.flops_since_log, self.tokens_since_log = now, 0.0, 0
        return values


# ------------------------------------------------------------------------------------------ helpers
def measure_peak(device: torch.device | str, precision: Precision = "fp32", seconds: float = 0.05) -> float:
    """GFLOP/s of a large matmul on the device: what `mfu` is a share of."""
    n = 768 if torch.device(device).type == "cpu" else 4096
    a = torch.ones(n, n, device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    (a @ a)[0, 0].item()  # warm up; item() waits for any device
    best, end = math.inf, time.perf_counter() + seconds
    while time.perf_counter() < end:
        began = time.perf_counter()
        (a @ a)[0, 0].item()
        best = min(best, time.perf_counter() - began)
    return 2 * n**3 / best / 1e9
