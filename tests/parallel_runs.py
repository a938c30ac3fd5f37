"""Runs of one process and of several, for test_train_parallel.py: `python parallel_runs.py FOLDER JOBS`. (RL's: rl_runs.py)

torch is imported once; each run forks as many processes as it wants. A job is
[name, case, world, settings of [train], more]: the case says model and adapters; the result is FOLDER/name, with
whole.safetensors of the trained model, or what each process had to say (ended-0 ...). `more` is what goes wrong
(`breaks`), at which document the last process is interrupted (`stop_at`), which job's folder it `goes_on` with.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # what a divided model imports, once for all processes
import torch.distributed.fsdp
from safetensors.torch import save_file

from trivet.config import UserError
from trivet.model import Transformer
from trivet.model.lora import Size, attach, places
from trivet.spec import GQA, MLA, GatedDeltaNet, Lightning, ModelSpec, MoE, Rope, SwiGLU
from trivet.train import checkpoint, trainer
from trivet.train.data import Document, stable_hash
from trivet.train.loop import Interrupted
from trivet.train.offload import Offloaded
from trivet.train.parallel import gathered, local, processes
from trivet.train.trainer import TrainConfig, train

MIXERS = {
    "gqa": GQA(heads=4, kv_heads=2, head_dim=8, rope=Rope(dims=8), qk_norm=True),
    "mla": MLA(heads=2, kv_rank=9, q_rank=10, nope_dim=4, v_dim=8, rope=Rope(dims=4)),
    "lightning": Lightning(heads=2, head_dim=8),
    "delta": GatedDeltaNet(heads=2, key_heads=1, key_dim=8, value_dim=8),
}
FFNS = {
    "dense": SwiGLU(hidden=20),
    "moe": MoE(experts=8, top_k=2, hidden=8, shared_hidden=8, balance=0.01),
    "gated": MoE(
        experts=4, top_k=2, hidden=8, shared_hidden=8, shared_gate=True, score="softmax", selection_bias=False
    ),
}
CASES: dict[str, dict[str, Any]] = {
    "dense": {"pattern": "gqa/dense*2", "tie_embeddings": True},
    "moe": {"pattern": "mla/dense mla/moe*2", "tie_embeddings": False, "mtp": 1},
    "hybrid": {"pattern": "lightning/moe gqa/dense", "tie_embeddings": True},
    "delta": {"pattern": "delta/gated gqa/gated", "tie_embeddings": True},
    "lora": {"pattern": "mla/moe gqa/dense", "tie_embeddings": False},
}
BASE = {
    "steps": 4,
    "rows": 4,
    "length": 24,
    "accumulate": 2,
    "tensorboard": False,
    "save_every_seconds": 1e9,
    "clip": 0.5,
}


class Counting:
    """Documents whose lengths differ much, and of which the first half has no loss: ranks differ in their targets."""

    def __getitem__(self, index: int) -> Document:
        rng = random.Random(stable_hash(3, index))
        n, start = rng.choice([3, 4, 20]), rng.randrange(23)
        given = rng.choice([1, n - 1])
        return Document([(start + i) % 23 for i in range(n)], [False] * given + [True] * (n - given))


def model_of(case: str) -> Transformer:
    """Every number takes part in the output (a new model is its embedding)."""
    model = Transformer(ModelSpec(vocab_size=23, d_model=16, mixers=MIXERS, ffns=FFNS, **CASES[case]), seed=1)
    if case == "lora":
        attach(model, dict.fromkeys(places(model), Size(3, 6, False)), seed=2)
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=g))
    return model


def means(model: Any, batches: Any, mtp_weight: float, precision: Any, recompute: bool, of: Any) -> Any:
    """What is wrong and often done: each process takes the mean over its targets, then these are averaged."""
    sums = real_backward(model, batches, mtp_weight, precision, recompute, trainer.Divisors.of(batches, model.spec.mtp))
    for p in model.parameters():
        if p.grad is not None:
            p.grad /= torch.distributed.get_world_size()
    return sums


real_backward = trainer.backward


class Stopping(Counting):
    """The last process is interrupted while it makes a document."""

    def __init__(self, index: int | None) -> None:
        self.index = index

    def __getitem__(self, index: int) -> Document:
        if index == self.index and os.environ.get("RANK", "0") == os.environ.get("LAST", "0"):
            os.kill(os.getpid(), signal.SIGTERM)
        return super().__getitem__(index)


def count_left(self: Offloaded) -> None:
    left.append(sum(p.grad is not None for p in self.on_device.values()))
    real_collect(self)


left: list[int] = []  # gradients with the model after each step's backward pass
real_collect = Offloaded.collect_gradients


def no_room(*args: object, **options: object) -> None:
    raise OSError(28, "No space left on device")


def last_logit(model: Transformer) -> dict[str, float]:
    tokens = torch.arange(24)[None] % 23
    return {"logit": model.logits(model(tokens))[0, -1, 0].item()}


def run(out: Path, case: str, settings: dict[str, Any], breaks: str, stop_at: int | None) -> None:
    rank = int(os.environ.get("RANK", "0"))
    if breaks == "means":
        trainer.backward = means
    if breaks == "disk" and rank == 1:
        checkpoint.save_tensors = no_room
    with processes(torch.device("cpu")) as device:
        model, config = model_of(case), TrainConfig(**{**BASE, **settings})
        Offloaded.collect_gradients = count_left  # type: ignore[method-assign]
        try:
            train(model, Stopping(stop_at), config, out, evaluate=last_logit, device=device)
        except (Interrupted, UserError) as e:
            out.mkdir(parents=True, exist_ok=True)
            (out / f"ended-{rank}").write_text(str(e))
            return
        (out / f"held-{rank}").write_text(str(sum(local(p).numel() for p in model.parameters())))
        (out / f"left-{rank}").write_text(json.dumps(left))
        whole = gathered(model)
        if whole is not None:
            save_file({name: t.contiguous() for name, t in whole.state_dict().items()}, out / "whole.safetensors")


def fork(rank: int, world: int, port: int, run: Callable[..., None], *job: Any) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        if world > 1:
            os.environ.update(
                RANK=str(rank), WORLD_SIZE=str(world), LAST=str(world - 1), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
            )  # fmt: skip
        run(*job)
        code = 0
    except BaseException:
        traceback.print_exc()
    os._exit(code)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def wait(pids: Sequence[int], may_fail: bool = False, timeout: float = 60) -> None:
    """Until all have ended; one that fails (unless it may), or takes too long, ends the others."""
    left, end = set(pids), time.monotonic() + timeout
    failed = False
    while left:
        for pid in list(left):
            got, status = os.waitpid(pid, os.WNOHANG)
            if got:
                left.discard(pid)
                failed |= status != 0 and not may_fail
        if failed or time.monotonic() > end:
            for pid in left:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            raise SystemExit("a process failed or hung")
        time.sleep(0.002)


def main(run: Callable[..., None]) -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    for name, case, world, settings, more in json.loads(sys.argv[2]):
        began, port, out = time.monotonic(), free_port(), folder / name
        if "goes_on" in more:
            shutil.copytree(folder / more["goes_on"], out)
        job = (out, case, settings, more.get("breaks", ""), more.get("stop_at"))
        wait([fork(rank, world, port, run, *job) for rank in range(world)], more.get("breaks") == "killed")
        print(f"{name}: {time.monotonic() - began:.1f} s", flush=True)


if __name__ == "__main__":
    main(run)
