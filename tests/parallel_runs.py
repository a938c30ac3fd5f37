"""Runs of one process and of several, for test_train_parallel.py: `python parallel_runs.py FOLDER JOBS`.

torch is imported once; each run forks as many processes as it wants. A job is
[name, case, world, settings of [train], signal]: the case says model and adapters; the result is FOLDER/name, with
whole.safetensors of the trained model.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from trivet.config import UserError
from trivet.model import Transformer
from trivet.model.lora import Size, attach, places
from trivet.spec import GQA, MLA, GatedDeltaNet, Lightning, ModelSpec, MoE, Rope, SwiGLU
from trivet.train import trainer
from trivet.train.data import Document, stable_hash
from trivet.train.parallel import gathered, processes
from trivet.train.trainer import Interrupted, TrainConfig, train

MIXERS = {
    "gqa": GQA(heads=4, kv_heads=2, head_dim=8, rope=Rope(dims=8), qk_norm=True),
    "mla": MLA(heads=2, kv_rank=9, q_rank=10, nope_dim=4, v_dim=8, rope=Rope(dims=4)),
    "lightning": Lightning(heads=2, head_dim=8),
    "delta": GatedDeltaNet(heads=2, key_heads=1, key_dim=8, value_dim=8),
}
FFNS = {
    "dense": SwiGLU(hidden=20),
    "moe": MoE(experts=8, top_k=2, hidden=8, shared_hidden=8, balance=0.01),
    "gated": MoE(experts=4, top_k=2, hidden=8, shared_hidden=8, shared_gate=True, score="softmax", selection_bias=False),
}
CASES: dict[str, dict[str, Any]] = {
    "dense": {"pattern": "gqa/dense*2", "tie_embeddings": True},
    "moe": {"pattern": "mla/dense mla/moe*2", "tie_embeddings": False, "mtp": 1},
    "hybrid": {"pattern": "lightning/moe gqa/dense", "tie_embeddings": True},
    "delta": {"pattern": "delta/gated gqa/gated", "tie_embeddings": True},
    "lora": {"pattern": "mla/moe gqa/dense", "tie_embeddings": False},
}
BASE = {"steps": 4, "rows": 4, "length": 24, "accumulate": 2, "tensorboard": False, "save_every_seconds": 1e9, "clip": 0.5}


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


def unfair(model: Any, batches: Any, mtp_weight: float, precision: Any, recompute: bool, of: Any) -> Any:
    """The twin: every process divides by its own targets, and the mean of these means is taken."""
    sums = real_backward(model, batches, mtp_weight, precision, recompute, trainer.Divisors.of(batches, model.spec.mtp))
    for p in model.parameters():
        if p.grad is not None:
            p.grad /= torch.distributed.get_world_size()
    return sums


real_backward = trainer.backward


def run(out: Path, case: str, settings: dict[str, Any]) -> None:
    settings = dict(settings)
    if settings.pop("unfair", False):
        trainer.backward = unfair
    stop_at = settings.pop("stop_at", None)
    with processes(torch.device("cpu")) as device:
        model = model_of(case)
        rank = int(os.environ.get("RANK", "0"))

        def evaluate(m: Transformer) -> dict[str, float]:
            with torch.no_grad():
                tokens = torch.arange(24)[None] % 23
                return {"logit": m.logits(m(tokens))[0, -1, 0].item()}

        class Stopping(Counting):
            """One process is interrupted while it makes a document."""

            def __getitem__(self, index: int) -> Document:
                if index == stop_at and rank == 1:
                    os.kill(os.getpid(), signal.SIGTERM)
                return super().__getitem__(index)

        config = TrainConfig(**{**BASE, **settings})
        try:
            train(model, Stopping(), config, out, evaluate=evaluate, device=device)
        except Interrupted as e:
            (out / f"interrupted-{rank}").write_text(str(e))
            return
        except UserError as e:
            out.mkdir(exist_ok=True)
            (out / f"error-{rank}").write_text(str(e))
            return
        whole = gathered(model)
        if whole is not None:
            save_file({name: t.contiguous() for name, t in whole.state_dict().items()}, out / "whole.safetensors")


def fork(rank: int, world: int, port: int, out: Path, case: str, settings: dict[str, Any]) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        if world > 1:
            os.environ.update(
                RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
            )
        run(out, case, settings)
        code = 0
    except BaseException:
        traceback.print_exc()
    os._exit(code)


def free_port() -> int:
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def wait(pids: Sequence[int], timeout: float = 60) -> None:
    """Until all have ended; one that fails, or takes too long, ends the others."""
    left, end = set(pids), time.monotonic() + timeout
    failed = False
    while left:
        for pid in list(left):
            got, status = os.waitpid(pid, os.WNOHANG)
            if got:
                left.discard(pid)
                failed |= status != 0
        if failed or time.monotonic() > end:
            for pid in left:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            raise SystemExit("a process failed or hung")
        time.sleep(0.002)


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    for name, case, world, settings in json.loads(sys.argv[2]):
        began, port = time.monotonic(), free_port()
        wait([fork(rank, world, port, folder / name, case, settings) for rank in range(world)])
        print(f"{name}: {time.monotonic() - began:.1f} s", flush=True)


if __name__ == "__main__":
    main()
