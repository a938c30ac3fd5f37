"""`kill -9` at random moments of RL with a tool, ten times: are the weights at the end those of a run left in peace?

    python benchmarks/killed.py --out runs/killed

Everything runs as a user would run it: `trivet train` makes a model that has begun to call a calculator, `trivet rl` goes
on with it, once in peace and once killed (SIGKILL to its process group) and started again by the same command. Ten moments
are drawn uniformly over the steps of the run; what was not yet saved then is lost and done again. At the end the weights,
the optimizer's state and every line of metrics, but for seconds, must be equal bit for bit. Twin: weights of the state saved
before the last one must differ, or nothing was compared.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from trivet.disk import Journal
from trivet.rl.learner import TIMES

STEPS, KILLS = 40, 10
START = """
tokenizer = "tiny"
threads = 1
tasks = [{ name = "arithmetic", levels = [1] }]

[model]
d_model = 96
context_length = 256
pattern = "lightning/moe mla/moe mla/moe"
tie_embeddings = false
mixers.lightning = { kind = "lightning", heads = 6, head_dim = 16 }
mixers.mla = { kind = "mla", heads = 6, kv_rank = 32, nope_dim = 16, v_dim = 16, rope = { dims = 16, theta = 1000.0 } }
ffns.moe = { kind = "moe", experts = 8, top_k = 2, hidden = 32, shared_hidden = 128, bias_rate = 0.01 }

[train]
steps = 700
rows = 6
length = 192
warmup = 20
decay_share = 0.5
tensorboard = false
"""
RL = f"""
start = "START"
threads = 1
tasks = [{{ name = "arithmetic", levels = [1] }}]

[rl]
steps = {STEPS}
problems = 16
group = 8
objective = "dapo"
epochs = 2
minibatches = 2
max_tokens = 80
muon_lr = 0.0015
adam_lr = 2e-4
length = 128
save_every_seconds = 2
tensorboard = false
"""
VARIANTS = {"a batch a step": [], "rl.partial = 0.5": ["rl.partial=0.5"], "rl.lag = 1": ["rl.lag=1"]}


def trivet(*words: str) -> list[str]:
    return [sys.executable, "-m", "trivet", *words]


def start(command: list[str], log: Path) -> subprocess.Popen[bytes]:
    """In a process group of its own, as a terminal or a scheduler would."""
    with log.open("ab") as file:
        return subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)


def to_the_end(command: list[str], log: Path) -> None:
    if start(command, log).wait():
        sys.exit(f"{' '.join(command)} failed:\n{log.read_text()[-2000:]}")


def steps_done(out: Path) -> int:
    journal = out / "metrics.jsonl"
    return journal.read_bytes().count(b"\n") if journal.exists() else 0


def saved(out: Path) -> int:
    return max((int(p.name.removeprefix("step-")) for p in (out / "resume").glob("step-*")), default=0)


def kill_at(moment: float, command: list[str], out: Path, log: Path, step_seconds: float) -> tuple[int, int] | None:
    """Run until `moment` (in steps) and kill: (steps done, of them saved). None: it ended before."""
    process = start(command, log)
    while steps_done(out) < int(moment):
        time.sleep(0.002)
        if process.poll() is not None:
            if process.returncode:
                sys.exit(f"the killed run failed by itself:\n{log.read_text()[-2000:]}")
            return None
    time.sleep(moment % 1 * step_seconds)
    os.killpg(process.pid, signal.SIGKILL)
    if process.wait() != -signal.SIGKILL:
        return None
    return steps_done(out), saved(out)


def state(out: Path, last: int = -1) -> dict[str, torch.Tensor]:
    """Weights and optimizer of a stored state, the last one by default, and the weights that were written at the end."""
    folder = sorted((out / "resume").glob("step-*"))[last]
    tensors = load_file(folder / "optimizer.safetensors")
    for where, file in (("state", folder / "model.safetensors"), ("end", out / "model.safetensors")):
        tensors |= {f"{where}.{name}": t for name, t in load_file(file).items()}
    return tensors


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(t, b[name]) for name, t in a.items())


def metrics(out: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k not in TIMES} for line in Journal(out / "metrics.jsonl").read()]


def compare(name: str, folder: Path, toml: Path, rng: random.Random) -> dict[str, Any]:
    """One variant: in peace, killed, and whether both are equal."""
    command = trivet("rl", str(toml), *VARIANTS[name], "--device", "cpu", "--out")
    peace, killed, log = folder / "peace", folder / "killed", folder / "log.txt"
    folder.mkdir()
    to_the_end([*command, str(peace)], log)
    step_seconds = metrics_seconds(peace) / STEPS
    kills = []
    for moment in sorted(rng.uniform(0, STEPS) for _ in range(KILLS)):
        done = kill_at(moment, [*command, str(killed)], killed, log, step_seconds)
        if done is not None:
            kills.append(done)
    to_the_end([*command, str(killed)], log)
    weights, lines = same(state(peace), state(killed)), metrics(peace) == metrics(killed)
    if same(state(peace), state(peace, -2)):
        sys.exit("two states of one run are equal: nothing was compared")
    calls = [line["calls_tool"] for line in metrics(peace)]
    return {
        "variant": name, "kills": len(kills), "done_and_saved": kills, "lost": sum(a - b for a, b in kills),
        "weights_equal": weights, "metrics_equal": lines, "calls_tool": [calls[0], calls[-1]],
        "accuracy": [metrics(peace)[0]["accuracy"], metrics(peace)[-1]["accuracy"]],
    }  # fmt: skip


def metrics_seconds(out: Path) -> float:
    seconds: float = Journal(out / "metrics.jsonl").read()[-1]["seconds"]
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, required=True, help="a new folder; a start that it holds is not trained again"
    )
    parser.add_argument("--variants", default=";".join(VARIANTS), help="separated by ';'")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "start.toml").write_text(START)
    (args.out / "rl.toml").write_text(RL.replace("START", str(args.out / "start")))
    to_the_end(trivet("train", str(args.out / "start.toml"), "--out", str(args.out / "start")), args.out / "log.txt")
    equal = True
    for i, name in enumerate(args.variants.split(";")):
        result = compare(name, args.out / f"variant-{i}", args.out / "rl.toml", random.Random())
        print(json.dumps(result), flush=True)
        equal &= result["weights_equal"] and result["metrics_equal"] and result["kills"] == KILLS
    sys.exit(0 if equal else "not equal, or not ten kills")


if __name__ == "__main__":
    main()
