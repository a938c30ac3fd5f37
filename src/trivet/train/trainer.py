"""One loop for pretraining and supervised fine-tuning.

A step takes `accumulate` microbatches and adds up their gradients (`step.py`). Muon and AdamW update, then the
routers' biases move by the step's loads.

On several processes (`parallel.py`) each computes its share of the rows; the sums are over all of them.

A run that is stopped at any moment, by Ctrl-C or kill -9, and started again with the same call ends
with the same bits and the same metrics as one that was never stopped (times excepted): the data is
a function of an index, randomness is seeded at every step, saving changes nothing.

Left out: dropout.
"""

from __future__ import annotations

import math
import signal
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Literal, Self

import torch
from pydantic import Field

from trivet.config import UserError
from trivet.disk import Journal
from trivet.model import Transformer
from trivet.model.experts import plain_name
from trivet.model.lora import adapter_parameters, fingerprint, training_flops_per_token
from trivet.spec import Frozen
from trivet.train.checkpoint import load_latest, save_state
from trivet.train.data import Batch, Documents, PackedBatches, share, stable_hash
from trivet.train.nested import shortened
from trivet.train.optim import Optimizer, clip, schedule
from trivet.train.parallel import clip as clip_parts
from trivet.train.parallel import divide, local, ranks_of
from trivet.train.step import Divisors, Precision, StepSums, backward

TIMES = ("seconds", "tokens_per_second", "gflops", "mfu")  # metrics that differ from run to run


class TrainConfig(Frozen):
    """How to train. Nothing here says on what."""

    steps: int = Field(gt=0, description="optimizer steps of the whole run")
    rows: int = Field(gt=0, description="rows of a microbatch")
    length: int = Field(gt=0, description="token slots of a row; documents are packed into it")
    accumulate: int = Field(default=1, gt=0, description="microbatches of an optimizer step, on all processes together")
    # How many processes there are is not what a run is: it may go on with others.
    shards: int = Field(
        default=0,
        ge=0,
        exclude=True,
        description="processes that divide the model (FSDP); 0: all that torchrun started",
    )
    expert_shards: int = Field(
        default=1, gt=0, exclude=True, description="divides experts further (EP): on shards x expert_shards processes"
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
    recompute: bool = Field(
        default=False,
        description="activation checkpointing: layers are computed again in the backward pass; less memory, a third more work",
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
    seed: int = Field(default=0, description="torch is seeded with (seed, step) at every step")
    log_every: int = Field(default=1, gt=0, description="steps between lines of metrics")
    eval_every: int = Field(default=0, ge=0, description="steps between evaluations; 0: only at the end")
    save_every_seconds: float = Field(default=60.0, ge=0, description="time between saved states")
    tensorboard: bool = Field(default=True, description="write TensorBoard event files too")


class Interrupted(KeyboardInterrupt):
    """The run was stopped on request; its text says how to go on."""


def train(
    model: Transformer,
    documents: Documents,
    config: TrainConfig,
    out: Path,
    *,
    progress: Callable[[dict[str, Any]], None] | None = None,
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
    try:
        with Deferred() as asked:
            while run.step < config.steps:
                run.train_step()
                last = run.step == config.steps
                scores = {}
                if evaluate and (last or (config.eval_every and run.step % config.eval_every == 0)):
                    scores = run.evaluate(evaluate)
                if last or scores or run.step % config.log_every == 0:
                    run.log(scores, progress)
                stop, due = run.ranks.any(asked.stop, run.since_save() >= config.save_every_seconds)
                if last or stop or due:
                    run.save()
                if stop and not last:
                    raise KeyboardInterrupt
    except KeyboardInterrupt:
        raise Interrupted(
            f"Stopped; step {run.saved} of {config.steps} is saved in {out}. The same command goes on from there."
        ) from None
    finally:
        run.close()
    return run.metrics


class _Run:
    """The state of a run between two steps."""

    def __init__(
        self, model: Transformer, documents: Documents, config: TrainConfig, out: Path, device: torch.device | str
    ):
        self.model, self.config, self.out, self.device = model, config, out, device
        self.ranks = ranks_of(config.shards, config.expert_shards)
        self.step, self.start, self.seconds = 0, 0, 0.0
        self.metrics: dict[str, Any] = {}
        self.totals = {"tokens": 0, "targets": 0, "slots": 0, "cut": 0}
        self.identity: dict[str, Any] = {
            "train": config.model_dump(mode="json"),
            "spec": model.spec.model_dump(mode="json"),
        }
        for harmless in ("save_every_seconds", "tensorboard", "recompute"):  # of these no bit depends
            del self.identity["train"][harmless]
        if adapter_parameters(model):  # a state holds the adapters only
            self.identity["base"] = fingerprint(model)
        self.parts = divide(model, self.ranks, torch.device(device)) if self.ranks.world > 1 else {}
        if not self.parts:
            model.to(device)
        groups = {
            kind: {plain_name(name): p for name, p in table.items()} for kind, table in model.optimizer_groups().items()
        }
        self.optimizer = Optimizer(groups, config.muon_lr, config.adam_lr, config.weight_decay, parts=self.parts)
        self.journal = Journal(out / "metrics.jsonl")
        state = load_latest(out / "resume", self.identity, self.ranks)
        if state is not None:
            state.apply(model, self.optimizer, self.parts)
            self.step, self.start, self.seconds = state.step, state.extra["document"], state.extra["seconds"]
            self.metrics, self.totals = state.extra["metrics"], state.extra["totals"]
        self.saved = self.step
        if self.ranks.first:
            self.journal.truncate_after(self.step)
        self.batches = PackedBatches(documents, config.rows, config.length, self.start, config.overflow)
        self.batches.cut = self.totals["cut"]
        writes = self.ranks.first and self.step < config.steps
        self.peak = self.ranks.world * measure_peak(device, config.precision) if writes else 0.0
        self.board = Board(out / "tensorboard", self.step) if config.tensorboard and writes else None
        self.began = self.saved_at = self.logged_at = time.perf_counter()
        self.flops_since_log = 0.0
        self.tokens_since_log = 0
        model.train()

    def train_step(self) -> None:
        config = self.config
        torch.manual_seed(stable_hash(config.seed, self.step))
        packed = [next(self.batches) for _ in range(config.accumulate)]
        batches = [batch.to(self.device) for batch in share(packed, self.ranks.rank, self.ranks.world)]
        of = Divisors.of(packed, self.model.spec.mtp)
        with shortened(self.model, config.nested_rank, stable_hash(config.seed, self.step, 1)):
            sums = backward(self.model, batches, config.mtp_weight, config.precision, config.recompute, of)
        loss, mtp, balance, *loads = self.ranks.sum([sums.loss, sums.mtp, sums.balance, *sums.loads])
        self.sums = StepSums(loss, mtp, balance, loads)
        if self.parts:
            self.norm = clip_parts(self.optimizer.named(), self.parts, self.ranks, config.clip)
        else:
            self.norm = clip(self.optimizer.parameters(), config.clip)
        self.rate = schedule(self.step, config.steps, config.warmup, config.decay_share, config.final_lr, config.decay)
        self.optimizer.step(self.rate)
        self.optimizer.zero_grad()
        self.model.update_router_bias(self.sums.loads)
        self.step += 1
        self._count(packed)

    def _count(self, packed: Sequence[Batch]) -> None:
        filled = sum(batch.filled for batch in packed)
        self.totals["tokens"] += filled
        self.totals["targets"] += sum(batch.count for batch in packed)
        self.totals["slots"] += sum(batch.tokens.numel() for batch in packed)
        self.totals["cut"] = self.batches.cut
        context = round(sum(batch.context for batch in packed) / filled)  # mean; documents, not rows
        self.flops_since_log += filled * training_flops_per_token(self.model, 2 * context - 1)
        self.tokens_since_log += filled

    def evaluate(self, evaluate: Callable[[Transformer], dict[str, float]]) -> dict[str, float]:
        self.model.eval()
        with torch.no_grad():
            scores = evaluate(self.model)
        self.model.train()
        return {f"eval/{name}": float(value) for name, value in scores.items()}

    def log(self, scores: dict[str, float], progress: Callable[[dict[str, Any]], None] | None) -> None:
        loss, norm = self.sums.loss.item(), self.norm.item()
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise UserError(
                f"Training broke at step {self.step}: loss {loss}, gradient norm {norm}. Lower muon_lr "
                f"or adam_lr, or warm up longer; the last good state is step {self.saved}."
            )
        fastest = self.config.muon_lr if self.optimizer.matrices else self.config.adam_lr
        values: dict[str, Any] = {"loss": loss, "grad_norm": norm, "lr": self.rate * fastest, **self.totals}
        if self.model.spec.mtp:
            values["mtp_loss"] = self.sums.mtp.item()
        if self.sums.loads:
            values["balance"] = self.sums.balance.item()
            values["expert_load"] = max((load.max() / load.mean()).item() for load in self.sums.loads)
        now = time.perf_counter()
        spent = now - self.logged_at
        gflops = self.flops_since_log / spent / 1e9
        values |= scores | {
            "seconds": self.seconds + now - self.began,
            "tokens_per_second": self.tokens_since_log / spent,
            "gflops": gflops,
            "mfu": gflops / self.peak if self.peak else 0.0,
        }
        self.logged_at, self.flops_since_log, self.tokens_since_log = now, 0.0, 0
        self.metrics = {"step": self.step, **values}
        if not self.ranks.first:
            return
        self.journal.append(self.step, **values)
        if self.board is not None:
            self.board.write(self.step, values)
        if progress is not None:
            progress(self.metrics)

    def since_save(self) -> float:
        return time.perf_counter() - self.saved_at

    def save(self) -> None:
        finite = all(bool(torch.isfinite(local(p)).all()) for p in self.optimizer.parameters())
        if self.ranks.any(not finite)[0]:
            raise UserError(
                f"The weights are not finite after step {self.step}, so that state was not saved; the "
                f"last good one is step {self.saved}. Lower muon_lr or adam_lr, or warm up longer."
            )
        if self.ranks.first:
            self.journal.sync()
        extra = {
            "document": self.batches.state,
            "seconds": self.seconds + time.perf_counter() - self.began,
            "metrics": self.metrics,
            "totals": self.totals,
        }
        save_state(self.out / "resume", self.step, self.model, self.optimizer, self.identity, extra, self.ranks)
        self.saved, self.saved_at = self.step, time.perf_counter()

    def close(self) -> None:
        if self.board is not None:
            self.board.close()


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


class Deferred:
    """Turns Ctrl-C and SIGTERM into `stop`, read between two steps; the second one stops at once.

    An interrupt in the middle of an update would leave weights that belong to no step.
    """

    def __init__(self) -> None:
        self.stop = False
        self._old: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # only there signals can be caught
            for number in (signal.SIGINT, signal.SIGTERM):
                self._old[number] = signal.signal(number, self._caught)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _caught(self, number: int, frame: FrameType | None) -> None:
        if self.stop:
            raise KeyboardInterrupt
        self.stop = True


class Board:
    """TensorBoard, if it is installed."""

    def __init__(self, folder: Path, step: int):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            warnings.warn(
                "TensorBoard is not installed, so only metrics.jsonl is written "
                "(pip install 'trivet[report]', or set tensorboard = false).",
                stacklevel=2,
            )
            self.writer = None
        else:
            self.writer = SummaryWriter(str(folder), purge_step=step + 1)

    def write(self, step: int, values: dict[str, Any]) -> None:
        if self.writer is not None:
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
