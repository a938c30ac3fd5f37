"""One measurement in a process of its own: a training step, serving, or what the machine can do.

    python -m trivet.measure.trial_run < question.json > answer.json

Memory on a CPU is the peak of the resident set, from after a warm-up to the end, so that the libraries are not
counted; on CUDA it is the allocator's own peak. `trial.py` says with what allocator the process starts.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from trivet.measure.activations import Setting
from trivet.model import Transformer
from trivet.spec import GQA, ModelSpec, Rope, SwiGLU
from trivet.train.data import Document, lay_out
from trivet.train.offload import make_optimizer
from trivet.train.optim import clip
from trivet.train.step import backward
from trivet.train.trainer import measure_peak

MEMINFO, STATUS = Path("/proc/meminfo"), Path("/proc/self/status")
DECODED = 4  # tokens
SEEN = 2**26  # numbers that are read to measure bandwidth: 256 MB, more than a cache holds
WARM_UP = ModelSpec(
    vocab_size=64, d_model=32, pattern="gqa/dense",
    mixers={"gqa": GQA(heads=2, kv_heads=1, head_dim=16, rope=Rope(dims=16))}, ffns={"dense": SwiGLU(hidden=32)},
)  # fmt: skip


def train(spec: ModelSpec, setting: Setting, device: torch.device, repeats: int) -> dict[str, float]:
    """Seconds of the last step; in the first, blocks and kernels are made."""
    model = Transformer(spec).to(device)
    optimizer = make_optimizer(setting.offload, model.optimizer_groups(), 0.02, 3e-3, 0.0)
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(setting.accumulate):
        ids = torch.randint(0, spec.vocab_size, (setting.rows, setting.length + 1), generator=generator)
        rows = [[Document(row, [True] * len(row))] for row in ids.tolist()]
        batches.append(lay_out(rows, setting.length).to(device))

    def step() -> None:
        sums = backward(model, batches, 0.3, setting.precision, setting.recompute)
        optimizer.collect_gradients()
        clip(optimizer.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        model.update_router_bias(sums.loads)

    return {"train": [seconds(step, device) for _ in range(repeats)][-1]}


@torch.no_grad()
def serve(spec: ModelSpec, setting: Setting, device: torch.device, repeats: int) -> dict[str, float]:
    """Seconds to read a prompt of `length` in every row, and of one step of decoding after it."""
    torch.set_default_dtype(torch.bfloat16 if setting.precision == "bf16" else torch.float32)  # never more than served
    model = Transformer(spec).to(device)
    torch.set_default_dtype(torch.float32)
    caches = model.new_caches(setting.rows, setting.length + DECODED)
    tokens = torch.zeros(setting.rows, setting.length, dtype=torch.long, device=device)
    at = torch.arange(setting.length, device=device).expand(setting.rows, -1)

    def prefill() -> None:
        hidden = model(tokens, at, caches=caches, span=setting.length)
        model.logits(hidden[:, -1]).argmax(-1)

    def decode(step: int) -> None:
        now = torch.full((setting.rows, 1), setting.length + step, device=device)
        hidden = model(tokens[:, :1], now, caches=caches, span=setting.length + step + 1)
        model.logits(hidden[:, -1]).argmax(-1)

    first = [seconds(prefill, device) for _ in range(repeats)][-1]
    return {"prefill": first, "decode": min(seconds(partial(decode, i), device) for i in range(DECODED))}


def machine(spec: ModelSpec, setting: Setting, device: torch.device, repeats: int) -> dict[str, float]:
    """What this machine can do: FLOP/s of a large product, bytes/s of reading, and the memory that is free."""
    flops = 1e9 * measure_peak(device, setting.precision, 0.1 * repeats)
    update = 1e9 * measure_peak(device, "bf16" if device.type == "cuda" else "fp32", 0.1 * repeats)  # as Muon has it
    seen = torch.ones(SEEN if repeats > 1 else 1, device=device)
    best = min(seconds(seen.sum, device) for _ in range(repeats))
    return {
        "flops": flops, "update_flops": update, "bytes_per_second": seen.nbytes / best, "memory": free_bytes(device),
        "cuda": device.type == "cuda",
    }  # fmt: skip


def free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if MEMINFO.is_file():
        return 1024 * int(MEMINFO.read_text().split("MemAvailable:")[1].split()[0])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def seconds(work: Callable[[], Any], device: torch.device) -> float:
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if STATUS.is_file():  # Linux, whose ru_maxrss would start at the size of the process that started this one
        return 1024 * int(STATUS.read_text().split("VmHWM:")[1].split()[0])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


KINDS = {"train": train, "serve": serve, "machine": machine}


def main() -> None:
    question = json.load(sys.stdin)
    name = question["device"]
    device = torch.device(name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    spec, setting = ModelSpec(**question["spec"]), Setting(**question["setting"])
    work = KINDS[question["what"]]
    work(WARM_UP, setting.model_copy(update={"rows": 1, "length": 16}), device, 1)
    before = peak_bytes(device)
    answer = work(spec, setting, device, question["repeats"])
    json.dump(answer | {"bytes": peak_bytes(device) - before}, sys.stdout)


if __name__ == "__main__":
    main()
