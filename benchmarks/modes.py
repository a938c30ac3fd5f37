"""Answers without thoughts: what learning from them does to a model that thinks.

    python benchmarks/modes.py runs/r1/final                      # of configs/r1/tiny.toml

2,000 lines of questions and right answers, without a thought, are learnt by the thinking model in three ways:

    keep    mode = "keep": the block is shut, no token of a thought has a loss
    mixed   half of them as "no_think", half the model's own traces as "think": Qwen3's fusion
    empty   what a template does that renders a missing thought as an empty one, and trains it: mode = "think", reasoning = ""

Measured on held-out chains, before and after: tokens of a thought, accuracy, and both switches: the share that thinks when it
may, and the share that does not when the block is shut (with nothing that enforces it).
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from trivet.hub.checkpoint import load_pair
from trivet.measure.evaluate import evaluate
from trivet.messages import Sampling
from trivet.recipes.kinds.base import Context
from trivet.recipes.kinds.sample import SampleConfig, SampleStage
from trivet.recipes.kinds.train import TrainStage
from trivet.recipes.stages import run_stage
from trivet.tasks import make_task

CHAIN = {"name": "chain", "min_steps": 2, "max_steps": 10}
TRAIN = {
    "steps": 60,
    "rows": 6,
    "length": 384,
    "muon_lr": 0.005,
    "adam_lr": 1e-3,
    "decay_share": 1.0,
    "tensorboard": False,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a directory of a model that thinks")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--count", type=int, default=512)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = {"before": [measure(args.model, args.count)]}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(args.seeds):
            for name, stage in variants(args.model, Path(folder), seed).items():
                out = Path(folder) / f"{name}-{seed}"
                run_stage(stage, context(out))
                rows.setdefault(name, []).append(measure(out, args.count))
    print(f"{'':8s}{'thought':>16s}{'accuracy':>16s}{'thinks':>16s}{'stays shut':>16s}{'accuracy, shut':>16s}")
    for name, found in rows.items():
        print(f"{name:8s}" + "".join(f"{spread([row[i] for row in found]):>16s}" for i in range(5)))


def measure(directory: Path, count: int) -> tuple[float, float, float, float, float]:
    model, chat = load_pair(directory)
    free = evaluate(model, chat, make_task(CHAIN), count=count, sampling=Sampling(max_tokens=128))
    shut = evaluate(model, chat, make_task(CHAIN), count=count, sampling=Sampling(max_tokens=128, thinking="off"))
    return (
        free.mean_reasoning_tokens, free.accuracy.mean, free.thinks, 1 - shut.budget_hit, shut.accuracy.mean,
    )  # fmt: skip


def variants(start: Path, folder: Path, seed: int) -> dict[str, TrainStage]:
    task = make_task(CHAIN)
    lines: list[dict[str, Any]] = []
    for i in range(2000):
        problem = task.problem("train", i)
        messages = [{"role": "user", "content": problem.prompt}, {"role": "assistant", "content": problem.answer}]
        lines.append({"messages": messages})
    bare = folder / "bare.jsonl"
    bare.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for line in lines:
        line["messages"][-1]["reasoning"] = ""
    empty = folder / "empty.jsonl"
    empty.write_text("".join(json.dumps(line) + "\n" for line in lines))
    own = folder / "own"
    if not own.exists():
        asked = SampleConfig(problems=2000, n=1, max_tokens=128)
        run_stage(SampleStage(start=str(start), tasks=(CHAIN,), sample=asked), context(own))
    talk = {"name": "conversations"}
    tasks: dict[str, tuple[dict[str, Any], ...]] = {
        "keep": ({**talk, "path": str(bare), "mode": "keep"},),
        "mixed": (
            {**talk, "path": str(bare), "mode": "no_think"}, {**talk, "path": str(own / "data.jsonl"), "mode": "think"},
        ),
        "empty": ({**talk, "path": str(empty), "mode": "think"},),
    }  # fmt: skip
    return {
        name: TrainStage.model_validate({"start": str(start), "tasks": given, "train": {**TRAIN, "seed": seed}})
        for name, given in tasks.items()
    }


def context(out: Path) -> Context:
    return Context(out, out.parent, None, torch.device("cpu"), None, lambda text: None)


def spread(values: list[float]) -> str:
    return f"{sum(values) / len(values):.3f}" + (f" ({min(values):.2f}-{max(values):.2f})" if len(values) > 1 else "")


if __name__ == "__main__":
    main()
