"""Reinforcement learning beside TRL's GRPOTrainer: seconds a step, memory, and what equal time is worth.

    python -m venv trl && trl/bin/pip install torch==2.13.0 trl==1.16.0
    python benchmarks/grpo.py --peer trl/bin/python                                                  # speed and memory
    python benchmarks/grpo.py --peer trl/bin/python --shape demo --threads 1 --seconds 60 --rounds 3 # equal time

Both start from one checkpoint that Trivet made and exported: Qwen3's form, 5.8M parameters, 8,192 tokens (of which the
demo's alphabet uses 119), trained a little on chains of digits. Both get the same problems in the same order, eight
answers each of at most 64 tokens at T = 1, the same reward, GRPO with one weight a token (DAPO's), no KL, one step of
AdamW a batch, whose learning rate, betas and clipping agree. `--sides` takes both as they come, too: Trivet with Muon for
the matrices, TRL with activation checkpointing.
What differs: samples are drawn by other random numbers; TRL divides by the sample's standard deviation, we by the
population's and leaves out groups whose rewards agree (the column `trained`), whose gradient is 0; a thought that leaves no
room for an answer is closed by our engine and cut off by TRL.

Each run is a process of its own; the sides take turns within a round. A number is the median over a run's steps
without its first, then over rounds. --seconds ends runs by the clock instead and evaluates what they made, here.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trivet.tasks import Task

HERE = Path(__file__).resolve().parent
PROBLEMS, GROUP, MAX_TOKENS = 8, 8, 64
MOST_STEPS = 1000  # of a run that the clock ends
SIDES: dict[str, dict[str, Any]] = {
    "trivet": {"side": "trivet"},
    "trivet-muon": {"side": "trivet", "optimizer": "muon"},  # as it comes
    "trivet-unshared": {"side": "trivet", "share": False},  # a prompt an answer, as TRL
    "trl": {"side": "trl"},
    "trl-checkpointing": {"side": "trl", "recompute": True},  # as it comes
}

# Qwen3's form: a ModelSpec's numbers; the training that both start from: rows, steps and the longest chain that it worked
# out; and how long the chains of RL are.
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"d_model": 256, "layers": 6, "heads": 4, "kv_heads": 2, "head_dim": 64, "hidden": 544, "vocab": 8192,
             "rows": 8, "steps": 100, "shown": 10, "chains": (8, 10)},
    "demo": {"d_model": 96, "layers": 4, "heads": 6, "kv_heads": 2, "head_dim": 16, "hidden": 256, "vocab": 128,
             "rows": 9, "steps": 800, "shown": 6, "chains": (8, 10)},
}  # fmt: skip


def task_of(shape: str) -> Task:
    from trivet.tasks import make_task

    least, most = SHAPES[shape]["chains"]
    return make_task({"name": "chain", "min_steps": least, "max_steps": most})


@dataclass(frozen=True)
class Job:
    """One run of a side."""

    side: str
    shape: str
    model: str  # the exported checkpoint
    asked: str  # lines of {"prompt", "answer"}, for TRL
    out: str
    steps: int
    threads: int
    precision: str = "fp32"
    seconds: float | None = None  # end after the step in which so many have passed
    cpu_time: bool = False  # of this process's own time
    recompute: bool = False
    share: bool = True  # with a group's prompt once in a row
    optimizer: str = "adamw"
    keep: bool = False  # write what was trained
    lr: float = 3e-4
    seed: int = 0
    problems: int = PROBLEMS
    group: int = GROUP
    max_tokens: int = MAX_TOKENS


# ------------------------------------------------------------------------------------------ the start
def start(shape: str, directory: Path, threads: int) -> Path:
    """The checkpoint that both sides start from, in Qwen3's format: made once."""
    exported = directory / shape
    if exported.is_dir():
        return exported
    import torch

    from trivet.chat import tiny_chat
    from trivet.model import Transformer
    from trivet.recipes.adapted import save_result
    from trivet.recipes.export import export
    from trivet.recipes.memory import keep_freed_memory
    from trivet.spec import GQA, ModelSpec, Rope, SwiGLU
    from trivet.tasks import make_task
    from trivet.train.data import TaskDocuments
    from trivet.train.trainer import TrainConfig, train

    keep_freed_memory()
    torch.set_num_threads(threads)
    s = SHAPES[shape]
    spec = ModelSpec(
        vocab_size=s["vocab"], d_model=s["d_model"], pattern=f"gqa/dense*{s['layers']}", context_length=1024,
        mixers={"gqa": GQA(heads=s["heads"], kv_heads=s["kv_heads"], head_dim=s["head_dim"], qk_norm=True,
                           rope=Rope(dims=s["head_dim"]))},
        ffns={"dense": SwiGLU(hidden=s["hidden"])},
    )  # fmt: skip
    model, chat, trained = Transformer(spec, seed=0), tiny_chat(), directory / f"{shape}-sft"
    config = TrainConfig(
        steps=s["steps"], rows=s["rows"], length=256, warmup=20, precision="bf16", log_every=20, tensorboard=False
    )
    task = make_task({"name": "chain", "min_steps": 2, "max_steps": 10, "shown": s["shown"]})
    train(model, TaskDocuments(task, chat), config, trained, progress=lambda values: print(
        f"{shape}: step {values['step']}, loss {values['loss']:.3f}", flush=True))  # fmt: skip
    save_result(model, chat, trained, None)
    export(trained, exported, family="qwen3")
    return exported


# ------------------------------------------------------------------------------------------ our side
def ours(job: Job) -> None:
    """The counterpart of grpo_trl.main."""
    import torch

    from grpo_watch import Watch, memory
    from trivet.hub.checkpoint import load_pair
    from trivet.model import save_model
    from trivet.recipes.memory import keep_freed_memory
    from trivet.rl.config import RLConfig
    from trivet.rl.learner import learn
    from trivet.rl.sampler import Batch, Sampler

    keep_freed_memory()  # as the command line does
    torch.set_num_threads(job.threads)
    model, chat = load_pair(Path(job.model))
    if job.optimizer == "adamw":  # for all, as TRL
        model.optimizer_groups = lambda: {"matrices": {}, "others": dict(model.named_parameters())}
    watch, last = Watch(asdict(job)), {}
    sample = watch.around(Sampler.sample)

    def kept(sampler: Sampler, step: int) -> Batch:
        last["batch"] = sample(sampler, step)
        return last["batch"]

    Sampler.sample = kept

    class Enough(Exception):
        pass

    def progress(values: dict[str, Any]) -> None:
        if watch.step(values["reward"], last["batch"].tokens, values["trained_share"]):
            raise Enough

    config = RLConfig(
        steps=job.steps, problems=job.problems, group=job.group, max_tokens=job.max_tokens, adam_lr=job.lr,
        muon_lr=10 * job.lr, precision=job.precision, recompute=job.recompute, seed=job.seed, length=128,
        share_prompts=job.share, tensorboard=False, save_every_seconds=1e9,
    )  # fmt: skip
    before = memory("VmRSS")
    watch.start()
    with suppress(Enough):
        learn(model, chat, [(task_of(job.shape), 1.0)], config, Path(job.out), progress=progress)
    peak = memory("VmHWM")
    if job.keep:
        save_model(model, Path(job.out))
        chat.save(Path(job.out))
    result = {
        "steps": watch.steps, "peak": peak, "before": before, "settings": len(RLConfig.model_fields),
        "prompt": list(last["batch"].attempts[0].episode.completions[0].prompt_tokens),
        "version": f"trivet, torch {torch.__version__}",
    }  # fmt: skip
    Path(job.out, "result.json").write_text(json.dumps(result))


# ------------------------------------------------------------------------------------------- rounds
def write_problems(start: Path, seed: int, job: Job) -> list[int]:
    """The problems that RL of ours draws, for TRL to go through in that order; the ids of the first prompt."""
    from trivet.chat import Chat
    from trivet.messages import Message
    from trivet.rl.rollout import draw_problems

    chat, tasks = Chat.load(start), [(task_of(job.shape), 1.0)]
    drawn = [problem for step in range(job.steps) for _, problem in draw_problems(tasks, seed, step, PROBLEMS)]
    ids = [list(chat.render([Message("user", problem.prompt)], generate=True).ids) for problem in drawn]
    lines = [
        json.dumps({"prompt": chat.tokenizer.decode(prompt, skip_special_tokens=False), "answer": problem.answer})
        for prompt, problem in zip(ids, drawn, strict=True)
    ]
    Path(job.asked).write_text("\n".join(lines) + "\n")
    return ids[0]


def launch(job: Job, peer: str, keep_memory: bool) -> dict[str, Any]:
    """Run a job in a process of its own; what it measured, and how busy the machine was when it began."""
    shutil.rmtree(job.out, ignore_errors=True)
    Path(job.out).mkdir(parents=True)
    environment = os.environ | {"OMP_NUM_THREADS": str(job.threads), "HF_HUB_OFFLINE": "1"}
    if keep_memory:  # what trivet.recipes.memory does, in glibc's words
        environment |= {
            "MALLOC_MMAP_MAX_": "0",
            "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1),
            "MALLOC_TOP_PAD_": str(2**26),
        }
    load = os.getloadavg()[0]
    ours = [sys.executable, str(HERE / "grpo.py"), "--job", json.dumps(asdict(job))]
    theirs = [peer, str(HERE / "grpo_trl.py"), json.dumps(asdict(job))]
    done = subprocess.run(
        ours if job.side == "trivet" else theirs, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{job.side} failed:\n{done.stderr[-3000:]}")
    return json.loads(Path(job.out, "result.json").read_text()) | {"load": load}


def check_alike(start: Path, first: list[int], result: dict[str, Any]) -> None:
    """TRL must have read the same prompt and graded as our task does."""
    from trivet.chat import Chat

    chat, last = Chat.load(start), result["last"]
    if result["prompt"] != first:
        raise SystemExit(f"The sides read different prompts: {result['prompt']} and {first}.")
    graded = [float(chat.parse(ids).content.strip() == a) for ids, a in zip(last["ids"], last["answers"], strict=True)]
    if graded != last["rewards"]:
        raise SystemExit("The sides grade the same answers differently.")


def summary(runs: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Medians over a run's steps without its first, then over runs."""

    def middle(key: str) -> float:
        return statistics.median(statistics.median(step[key] for step in run["steps"][1:]) for run in runs)

    steps = [step for run in runs for step in run["steps"]]
    return {key: middle(key) for key in ("seconds", "cpu", "generating", "generating_cpu")} | {
        "peak_mb": statistics.median(run["peak"] for run in runs) / 1e6,
        "grown_mb": statistics.median(run["peak"] - run["before"] for run in runs) / 1e6,
        "tokens": statistics.mean(step["tokens"] for step in steps),
        "reward": statistics.mean(step["reward"] for step in steps),
        "trained": statistics.mean(step["trained"] for step in steps),
        "load": statistics.mean(run["load"] for run in runs),
    }


HEADER = f"{'':24}{'s/step':>8}{'generate':>10}{'update':>8}{'CPU s':>8}{'generate':>10}{'peak MB':>9}{'of it RL':>10}{'tokens':>8}{'trained':>9}{'load':>6}"


def row(name: str, s: dict[str, float]) -> str:
    return (
        f"{name:24}{s['seconds']:8.2f}{s['generating']:10.2f}{s['seconds'] - s['generating']:8.2f}{s['cpu']:8.2f}"
        f"{s['generating_cpu']:10.2f}{s['peak_mb']:9.0f}{s['grown_mb']:10.0f}{s['tokens']:8.0f}{s['trained']:9.0%}{s['load']:6.1f}"
    )


def speed(args: argparse.Namespace, start: Path, job: Job) -> list[dict[str, Any]]:
    first, results = write_problems(start, job.seed, job), []
    for precision in args.precision:
        for threads in args.threads:
            runs: dict[str, list[dict[str, Any]]] = {name: [] for name in args.sides}
            for _ in range(args.rounds):
                for name in args.sides:
                    one = replace(job, precision=precision, threads=threads, **SIDES[name])
                    runs[name].append(launch(one, args.peer, args.keep_memory))
                    if one.side == "trl":
                        check_alike(start, first, runs[name][-1])
            print(f"{args.shape}, {precision}, {threads} thread{'s' * (threads > 1)}\n{HEADER}")
            found = {name: summary(of) for name, of in runs.items()}
            base = found[args.sides[0]]
            for name, s in found.items():
                ratios = f"  {s['seconds'] / base['seconds']:.2f}x the time, {s['cpu'] / base['cpu']:.2f}x CPU, {s['peak_mb'] / base['peak_mb']:.2f}x memory"
                print(row(name, s) + (ratios if s is not base else ""), flush=True)
            results.append({"precision": precision, "threads": threads, "sides": found, "runs": runs})
    return results


def equal_time(args: argparse.Namespace, start: Path, job: Job) -> list[dict[str, Any]]:
    """What the model is worth after the same seconds of training on each side. Evaluated here, by our engine."""
    from trivet.chat import Chat
    from trivet.hub.checkpoint import load_any
    from trivet.measure.evaluate import evaluate
    from trivet.messages import Sampling

    def worth(directory: Path) -> dict[str, Any]:
        model, chat = load_any(directory), Chat.load(start)
        found = {
            name: evaluate(model, chat, task_of(args.shape), count=args.count, slots=128,
                           sampling=Sampling(temperature=temperature, max_tokens=MAX_TOKENS)).accuracy
            for name, temperature in (("greedy", 0.0), ("T=1", 1.0))
        }  # fmt: skip
        return {name: share.model_dump() for name, share in found.items()}

    def show(name: str, steps: int, found: dict[str, Any], seconds: float) -> None:
        shares = ", ".join(f"{k} {s['mean']:.3f} [{s['low']:.3f}, {s['high']:.3f}]" for k, s in found.items())
        print(f"{name:24}{steps:4} steps in {seconds:5.0f} s   {shares}", flush=True)

    before = worth(start)
    show("start", 0, before, 0.0)
    results: list[dict[str, Any]] = [{"side": "start", "worth": before}]
    for seed in range(args.rounds):
        job = replace(
            job, seed=seed, precision=args.precision[0], threads=args.threads[-1], seconds=args.seconds, keep=True
        )
        first = write_problems(start, seed, job)
        for name in args.sides:
            one = replace(job, **SIDES[name])
            run = launch(one, args.peer, args.keep_memory)
            if one.side == "trl":
                check_alike(start, first, run)
            after = worth(Path(one.out))
            seconds = sum(step["cpu" if args.cpu_time else "seconds"] for step in run["steps"])
            show(name, len(run["steps"]), after, seconds)
            results.append({"side": name, "seed": seed, "worth": after, "run": run})
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", required=True, help="the Python that has TRL")
    parser.add_argument("--dir", type=Path, default=Path("runs/grpo"), help="the start, and what runs write")
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--sides", type=lambda text: text.split(","), default=["trivet", "trl"], help=", ".join(SIDES))
    parser.add_argument("--threads", type=lambda text: [int(n) for n in text.split(",")], default=[1, 2])
    parser.add_argument("--precision", type=lambda text: text.split(","), default=["fp32"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="of a run, the first of which is not counted")
    parser.add_argument("--seconds", type=float, help="equal time instead: train for so long and evaluate")
    parser.add_argument(
        "--cpu-time", action="store_true", help="count those by the process's own clock, on a busy machine"
    )
    parser.add_argument("--count", type=int, default=512, help="problems of an evaluation")
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--keep-memory", action="store_true", help="TRL keeps freed memory, too, as `trivet` does")
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    args = parser.parse_args()
    begun = start(args.shape, args.dir, max(args.threads))
    from common import _cpu, write

    steps = args.steps if args.seconds is None else MOST_STEPS
    job = Job(
        "", args.shape, str(begun), str(args.dir / f"{args.shape}.jsonl"), str(args.dir / f"{args.shape}-run"), steps, 1,
        cpu_time=args.cpu_time, lr=args.lr,
    )  # fmt: skip
    facts = {"machine": _cpu(), "cores": len(os.sched_getaffinity(0)), "load": os.getloadavg()[0], "args": vars(args)}
    print(f"{facts['machine']}, {facts['cores']} cores, load {facts['load']:.1f}")
    results = (speed if args.seconds is None else equal_time)(args, begun, job)
    facts["load_after"] = os.getloadavg()[0]
    runs = [run for r in results for some in r["runs"].values() for run in some] if args.seconds is None else []
    for version, settings in sorted({(run["version"], run["settings"]) for run in runs}):
        print(f"{version}: {settings} settings")
    print(f"load {facts['load']:.1f} before, {facts['load_after']:.1f} after")
    write(args.out, json.loads(json.dumps({"benchmark": "grpo", "machine": facts, "results": results}, default=str)))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--job"]:
        ours(Job(**json.loads(sys.argv[2])))
    else:
        main()
