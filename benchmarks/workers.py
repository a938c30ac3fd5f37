"""Seconds that a batch of episodes takes here, and with Ray's workers: all of them in turn, step by step.

Beside the wall clock stands the CPU time of this process, which other jobs disturb less: of a whole batch, of a half
(what one of two workers does), and of what is left to do here when workers play.

python benchmarks/workers.py --model runs/demo/sft --workers 1,2 --steps 8
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch

from trivet.hub.checkpoint import load_pair
from trivet.recipes.memory import keep_freed_memory
from trivet.rl.config import RLConfig
from trivet.rl.sampler import Sampler
from trivet.rl.workers import Workers, connect
from trivet.tasks import Task, make_task


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--workers", default="1,2")
    parser.add_argument("--steps", type=int, default=8)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    counts = [int(n) for n in asked.workers.split(",")]
    model, chat = load_pair(asked.model)
    tasks: list[tuple[Task, float]] = [  # those of the demo's `rl`
        (make_task({"name": "chain", "min_steps": 8, "max_steps": 12}), 0.8),
        (make_task({"name": "arithmetic"}), 0.2),
    ]
    plain = RLConfig(steps=asked.steps, max_tokens=64)
    connect(plain.model_copy(update={"workers": sum(counts)}), 1, torch.device("cpu"))  # one Ray for all of them
    half = plain.model_copy(update={"problems": plain.problems // 2})
    samplers: dict[str, Sampler] = {
        "here": Sampler(model, chat, tasks, plain, "cpu"),
        "half of it": Sampler(model, chat, tasks, half, "cpu"),
    }
    for n in counts:
        samplers[f"{n} workers"] = Workers(model, chat, tasks, plain.model_copy(update={"workers": n}), "cpu")
    keep_freed_memory()  # as `trivet` does
    seconds: dict[str, list[float]] = {name: [] for name in samplers}
    cpu: dict[str, list[float]] = {name: [] for name in samplers}
    for step in range(-1, asked.steps):  # the first one warms up
        tokens = {}
        for name, sampler in samplers.items():
            began, busy = time.perf_counter(), time.process_time()
            batch = sampler.sample(max(step, 0))
            if step >= 0:
                seconds[name].append(time.perf_counter() - began)
                cpu[name].append(time.process_time() - busy)
            tokens[name] = [a.episode.completions[-1].tokens for a in batch.attempts]
        assert all(found == tokens["here"] for name, found in tokens.items() if name != "half of it"), (
            "not the same episodes"
        )
    for name in samplers:
        wall, own = statistics.median(seconds[name]), statistics.median(cpu[name])
        print(f"{name:12} {wall:.2f} s (least {min(seconds[name]):.2f}), CPU time of this process {own:.3f} s")
    for sampler in samplers.values():
        sampler.close()


if __name__ == "__main__":
    main()
