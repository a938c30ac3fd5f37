"""What RL's choices are worth off-policy: objectives at equal compute, replay of experts, the head's precision.

    python benchmarks/objectives.py objectives --base runs/r1/base --out docs/objectives.jsonl --plot docs/objectives.svg
    python benchmarks/objectives.py far        --base runs/r1/base --out docs/far.jsonl --plot docs/far.svg
    python benchmarks/objectives.py replay     --base runs/r1/base --out docs/replay.jsonl

All runs of a study start from the same weights (the `base` of configs/r1/tiny.toml, which is trained if it is not
there), see the same problems at the same step under the same seed, sample as many episodes and take as many optimizer
steps on them, at one learning rate that does not decay. Before the first step on a batch every objective of the table is
the same policy gradient up to its normaliser, so a batch is gone through in many minibatches: the last of them
learns from what is that many steps old. Steps of the optimizer are what off-policy means here.

A line of JSON a run; runs that the file holds are not run again. Numbers do not depend on the machine, but for seconds.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RECIPE = Path(__file__).parents[1] / "configs/r1/tiny.toml"
CHAINS = {"name": "chain", "min_steps": 2, "max_steps": 10}
T95 = {
    2: 12.706,
    3: 4.303,
    4: 3.182,
    5: 2.776,
    6: 2.571,
    7: 2.447,
    8: 2.365,
    9: 2.306,
    10: 2.262,
}  # Student's t by the number of seeds
KEPT = (
    "accuracy", "clip_share", "ratio/last_max_abs_log", "entropy", "grad_norm", "no_spread", "drawn", "mismatch/kl",
    "mismatch/max_abs_log", "routing/agreement", "reasoning_tokens", "answer_tokens",
)  # fmt: skip
SMOOTH = 5  # steps of a running mean

COMMON: dict[str, Any] = {
    "problems": 32, "group": 8, "epochs": 1, "minibatches": 16, "max_tokens": 128, "muon_lr": 0.001, "adam_lr": 1e-4,
    "rows": 16, "tensorboard": False, "save_every_seconds": 1e9,
}  # fmt: skip


@dataclass(frozen=True)
class Study:
    steps: int
    cells: dict[str, dict[str, Any]]  # what differs, by name


ROWS: dict[str, dict[str, Any]] = {name: {"objective": name} for name in ("grpo", "dapo", "cispo", "gspo")}
STUDIES = {
    "objectives": Study(
        24,
        ROWS
        | {
            "gspo, 100 times its range": {"objective": "gspo", "overrides": {"low": 0.03, "high": 0.04}},
            "dapo, dynamic": {"objective": "dapo", "dynamic": 3},
        },
    ),
    # Three times the rate, so that the last minibatch is far from what sampled it; and CISPO with DAPO's upper bound.
    "far": Study(
        16,
        {
            name: cell | {"muon_lr": 0.003, "adam_lr": 3e-4}
            for name, cell in (ROWS | {"cispo, high = .28": {"objective": "cispo", "overrides": {"high": 0.28}}}).items()
        },
    ),
    # The limit on engine against trainer is lifted: what bf16 does to it is what is measured.
    "replay": Study(
        12,
        {
            f"{precision}, {replay}": {"precision": precision, "replay": replay, "mismatch_limit": 10.0}
            for precision in ("fp32", "bf16")
            for replay in ("none", "trainer", "sampler")
        }
        | {"bf16 with its head, trainer": {"precision": "bf16", "fp32_head": False, "mismatch_limit": 10.0}},
    ),
}  # fmt: skip


# ------------------------------------------------------------------------------------------------ a run
def make_base(folder: Path) -> None:
    """The recipe's first stage alone, unless it is there."""
    import torch

    from trivet.recipes.stages import Recipe, run_recipe

    if not (folder / "done.json").exists():
        text = tomllib.loads(RECIPE.read_text())
        stages = {folder.name: text["stages"]["base"]}
        recipe = Recipe.model_validate({"name": "base", "threads": 1, "stages": stages})
        run_recipe(recipe, folder.parent, torch.device("cpu"), lambda name, stage: None, print)


def run(study: Study, cell: str, seed: int, base: Path, changes: dict[str, Any]) -> dict[str, Any]:
    """One run, here, on one thread."""
    import torch

    from trivet.hub.checkpoint import load_pair
    from trivet.measure.evaluate import evaluate
    from trivet.messages import Sampling
    from trivet.recipes.memory import keep_freed_memory
    from trivet.rl.config import RLConfig
    from trivet.rl.learner import learn
    from trivet.tasks import make_task

    keep_freed_memory()
    torch.set_num_threads(1)
    model, chat = load_pair(base, torch.device("cpu"), torch.float32)
    task = make_task(CHAINS)
    config = RLConfig.model_validate({"steps": study.steps, "seed": seed, **COMMON, **study.cells[cell], **changes})
    lines: list[dict[str, Any]] = []
    began, cpu = time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory() as out:
        learn(model, chat, [(task, 1.0)], config, Path(out), progress=lines.append)
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    held_out = {
        name: evaluate(
            model, chat, task, sampling=Sampling(temperature=temperature, max_tokens=config.max_tokens)
        ).accuracy.mean
        for name, temperature in (("greedy", 0.0), ("T=1", 1.0))
    }
    curves = {key: [float(f"{line[key]:.5g}") for line in lines] for key in KEPT if key in lines[0]}
    curves["tokens"] = [
        round(line.get("drawn", config.problems) * config.group * (line["reasoning_tokens"] + line["answer_tokens"]))
        for line in lines
    ]
    return {
        "cell": cell, "seed": seed, "held_out": held_out, "seconds": round(seconds), "cpu_seconds": round(cpu),
        "load": os.getloadavg()[0], "settings": config.model_dump(mode="json", exclude_defaults=True), "curves": curves,
    }  # fmt: skip


# ----------------------------------------------------------------------------------------------- numbers
def interval(values: Sequence[float]) -> str:
    """Mean and half a 95% interval (Student's t over seeds)."""
    mean = statistics.mean(values)
    if len(values) < 2:
        return f"{mean:.3g}"
    half = T95[len(values)] * statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean:.3g} ± {half:.2g}"


def smooth(curve: Sequence[float]) -> list[float]:
    """The mean of the last SMOOTH steps, at every step."""
    return [statistics.mean(curve[max(0, i + 1 - SMOOTH) : i + 1]) for i in range(len(curve))]


def reached(result: dict[str, Any], level: float) -> int | None:
    """The first step at which the running mean of a full window has reached `level`."""
    means = smooth(result["curves"]["accuracy"])
    return next((i + 1 for i, mean in enumerate(means) if i + 1 >= SMOOTH and mean >= level), None)


def tokens_until(result: dict[str, Any], step: int | None) -> float | None:
    """Thousands of tokens sampled up to a step."""
    return None if step is None else sum(result["curves"]["tokens"][:step]) / 1e3


def all_or_none(values: Sequence[float | None]) -> str:
    known = [v for v in values if v is not None]
    return interval(known) if len(known) == len(values) else f"{len(known)} of {len(values)} runs"


def mean_of(key: str) -> Callable[[dict[str, Any]], float | None]:
    """The mean of a metric over a run's steps."""
    return lambda r: statistics.mean(r["curves"][key]) if key in r["curves"] else None


OBJECTIVES: dict[str, Callable[[dict[str, Any]], float | None]] = {
    "greedy": lambda r: r["held_out"]["greedy"],
    "T = 1": lambda r: r["held_out"]["T=1"],
    "mean of all steps": mean_of("accuracy"),
    "steps to .6": lambda r: reached(r, 0.6),
    "steps to .7": lambda r: reached(r, 0.7),
    "steps to .8": lambda r: reached(r, 0.8),
    "k tokens to .7": lambda r: tokens_until(r, reached(r, 0.7)),
    "k tokens to .8": lambda r: tokens_until(r, reached(r, 0.8)),
    "k tokens in all": lambda r: tokens_until(r, len(r["curves"]["tokens"])),
    "clipped": mean_of("clip_share"),
    "largest abs log ratio": mean_of("ratio/last_max_abs_log"),
    "CPU seconds": lambda r: r["cpu_seconds"],
}
REPLAY: dict[str, Callable[[dict[str, Any]], float | None]] = {
    "KL(engine, trainer)": mean_of("mismatch/kl"),
    "largest difference": mean_of("mismatch/max_abs_log"),
    "agreement": mean_of("routing/agreement"),
    "largest abs log ratio": mean_of("ratio/last_max_abs_log"),
    "clipped": mean_of("clip_share"),
    "mean of all steps": mean_of("accuracy"),
    "greedy": lambda r: r["held_out"]["greedy"],
    "T = 1": lambda r: r["held_out"]["T=1"],
}


def show(study: str, results: Sequence[dict[str, Any]]) -> None:
    """The table, in Markdown."""
    columns = REPLAY if study == "replay" else OBJECTIVES
    print("| |", " | ".join(columns), "|")
    print("|---" * (len(columns) + 1) + "|")
    for cell in STUDIES[study].cells:
        mine = [r for r in results if r["cell"] == cell]
        if mine:
            print(
                f"| {cell} ({len(mine)}) |",
                " | ".join(all_or_none([f(r) for r in mine]) for f in columns.values()),
                "|",
            )


def against(study: str, results: Sequence[dict[str, Any]]) -> None:
    """What every cell differs in from DAPO's of the same seed, which saw the same problems."""
    of = {(r["cell"], r["seed"]): r for r in results}
    seeds = sorted({seed for _, seed in of})
    for cell in STUDIES[study].cells:
        pairs = [(of[cell, s], of["dapo", s]) for s in seeds if (cell, s) in of and ("dapo", s) in of]
        if cell == "dapo" or not pairs:
            continue
        told = []
        for name in ("T = 1", "mean of all steps", "steps to .7", "steps to .8"):
            values = [(OBJECTIVES[name](a), OBJECTIVES[name](b)) for a, b in pairs]
            told.append(f"{name} {all_or_none([None if x is None or y is None else x - y for x, y in values])}")
        print(f"{cell} less dapo, seed by seed: {'; '.join(told)}")


def plot(study: str, results: Sequence[dict[str, Any]], path: Path) -> None:
    """Accuracy over steps and over tokens, and what is clipped: a line an objective, a band from seed to seed."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": study}
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for i, cell in enumerate(STUDIES[study].cells):
        mine = [r["curves"] for r in results if r["cell"] == cell]
        if not mine:
            continue
        curves = [smooth(c["accuracy"])[SMOOTH - 1 :] for c in mine]
        steps = range(SMOOTH, SMOOTH + len(curves[0]))
        means = [statistics.mean(at) for at in zip(*curves, strict=True)]
        left.plot(steps, means, f"C{i}", label=cell)
        left.fill_between(
            steps, [min(at) for at in zip(*curves, strict=True)], [max(at) for at in zip(*curves, strict=True)],
            color=f"C{i}", alpha=0.12, linewidth=0,
        )  # fmt: skip
        tokens = [statistics.mean(sum(c["tokens"][:s]) for c in mine) / 1e3 for s in steps]
        middle.plot(tokens, means, f"C{i}")
        clipped = [statistics.mean(at) for at in zip(*(c["clip_share"] for c in mine), strict=True)]
        right.plot(range(1, 1 + len(clipped)), clipped, f"C{i}")
    left.set(xlabel="batches", ylabel=f"right when sampled, mean of {SMOOTH} batches")
    middle.set(xlabel="thousand tokens sampled")
    right.set(xlabel="batches", ylabel="tokens clipped in a batch's last update", yscale="symlog")
    right.set_yscale("symlog", linthresh=1e-4)
    left.legend(frameon=False)
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None})


# ------------------------------------------------------------------------------------------------- main
def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--base", type=Path, required=True, help="the model to start from; made if it is not there")
    parser.add_argument("--cells", help="some of the study's cells, separated by ';'; default: all")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, a thread each")
    parser.add_argument(
        "--set", type=json.loads, default={}, help='settings of [rl] to change in all runs: {"steps": 5}'
    )
    parser.add_argument("--out", type=Path, help="a line of JSON a run; runs that it holds are not run again")
    parser.add_argument("--plot", type=Path, help="write the curves of the objectives here")
    parser.add_argument("--one", action="store_true", help="run the one cell and seed here and print JSON")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    study, seeds = STUDIES[args.study], [int(s) for s in args.seeds.split(",")]
    cells = args.cells.split(";") if args.cells else list(study.cells)
    if args.one:
        print(json.dumps(run(study, cells[0], seeds[0], args.base, args.set)))
        return
    make_base(args.base)
    known = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out and args.out.exists() else []
    done_before = {(r["cell"], r["seed"]): r for r in known}

    def job(pair: tuple[str, int]) -> dict[str, Any]:
        if pair in done_before:
            return done_before[pair]
        command = [sys.executable, __file__, args.study, "--one", "--cells", pair[0], "--seeds", str(pair[1])]
        command += ["--base", str(args.base), "--set", json.dumps(args.set)]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        if done.returncode:
            raise RuntimeError(f"{pair}: {done.stderr}")
        result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        if args.out:
            with args.out.open("a") as file:
                file.write(json.dumps(result) + "\n")
        last = smooth(result["curves"]["accuracy"])[-1]
        print(f"{pair[0]:24s} seed {pair[1]}  last {SMOOTH} batches {last:.3f}  {result['seconds']} s", flush=True)
        return result

    # seeds outermost: the cells of one seed run in the same minutes
    with ThreadPoolExecutor(args.jobs) as pool:
        results = list(pool.map(job, [(c, s) for s in seeds for c in cells]))
    show(args.study, results)
    if args.study != "replay":
        against(args.study, results)
    if args.plot:
        plot(args.study, results, args.plot)


if __name__ == "__main__":
    main()
