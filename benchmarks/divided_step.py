"""A step that several processes divide: the memory of one of them, predicted and measured, and seconds.

    torchrun --nproc-per-node 4 benchmarks/divided_step.py gqa/dense*8 4
    torchrun --nproc-per-node 4 benchmarks/divided_step.py gqa/moe*6 2 2     # pattern, shards, expert shards

Memory on a CPU is the peak of the resident set without what was there before the model; on CUDA the allocator's.
"""

from __future__ import annotations

import ctypes
import sys
import time
from pathlib import Path

import torch

from trivet.measure.activations import Setting
from trivet.measure.memory import training_memory
from trivet.measure.trial_run import peak_bytes
from trivet.model import Transformer
from trivet.model.experts import plain_name
from trivet.spec import GQA, ModelSpec, MoE, Rope, SwiGLU
from trivet.train.data import Document, lay_out
from trivet.train.optim import Optimizer
from trivet.train.parallel import clip, divide, processes, ranks_of
from trivet.train.step import Divisors, backward

LENGTH = 256


def spec_of(pattern: str, vocab: int = 4096) -> ModelSpec:
    return ModelSpec(
        vocab_size=vocab, d_model=512, pattern=pattern,
        mixers={"gqa": GQA(heads=8, kv_heads=2, head_dim=64, rope=Rope(dims=64))},
        ffns={"dense": SwiGLU(hidden=1536), "moe": MoE(experts=16, top_k=2, hidden=384, shared_hidden=384)},
    )  # fmt: skip


def resident() -> int:
    return 1024 * int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0])


def forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        return torch.cuda.reset_peak_memory_stats(device)
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def run(spec: ModelSpec, shards: int, expert_shards: int, device: torch.device, steps: int = 3) -> tuple[int, float]:
    """(peak bytes, seconds of the last step)"""
    ranks = ranks_of(shards, expert_shards)
    before = resident() if device.type == "cpu" else 0
    model = Transformer(spec)
    parts = divide(model, ranks, device)
    groups = {kind: {plain_name(n): p for n, p in table.items()} for kind, table in model.optimizer_groups().items()}
    optimizer = Optimizer(groups, parts=parts)
    batch = lay_out([[Document([i % 64 for i in range(LENGTH + 1)], [True] * (LENGTH + 1))]], LENGTH).to(device)
    forget_peak(device)
    for _ in range(steps):
        began = time.perf_counter()
        backward(model, [batch], 0.3, "fp32", True, Divisors(LENGTH * ranks.world, [], ranks.world))
        clip(optimizer.named(), parts, ranks, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
    return peak_bytes(device) - before, time.perf_counter() - began


def main() -> None:
    pattern, shards, expert_shards = sys.argv[1], int(sys.argv[2]), int((sys.argv[3:] or ["1"])[0])
    ctypes.CDLL(None).mallopt(-3, 2**16)  # M_MMAP_THRESHOLD: what is freed goes back to the system
    torch.set_num_threads(1)
    with processes(torch.device("cuda" if torch.cuda.is_available() else "cpu")) as device:
        run(spec_of(pattern.partition("*")[0], 64), shards, expert_shards, device, 1)  # libraries
        measured, seconds = run(spec_of(pattern), shards, expert_shards, device)
        s = Setting(
            length=LENGTH, precision="fp32", recompute=True, shards=shards, expert_shards=expert_shards,
            cpu=device.type == "cpu",
        )  # fmt: skip
        held = training_memory(spec_of(pattern), s)
        if torch.distributed.get_rank() == 0:
            alone = training_memory(spec_of(pattern), s.model_copy(update={"shards": 1, "expert_shards": 1})).peak
            print(
                f"{pattern}, {shards} shards x {expert_shards}: {measured / 1e6:.0f} MB measured, {held.peak / 1e6:.0f} MB "
                f"predicted ({held.row()['peak_in']}; one process {alone / 1e6:.0f} MB), {seconds:.2f} s a step"
            )


if __name__ == "__main__":
    main()
