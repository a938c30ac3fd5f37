"""What each architectural idea buys on real text, at equal tokens and equal active parameters.

nanoGPT's CPU setting on its Shakespeare characters (first 90% train, last 10% validation): 4 layers,
width 128, block 64, batch 12, 2000 steps, no dropout. nanoGPT publishes a validation loss of 1.88.
Here the loss is over the whole validation part, in consecutive windows of 64 characters.

    python benchmarks/shakespeare.py --text input.txt --seeds 0,1,2

One process a run, `--jobs` at a time. The loss does not depend on the machine; tokens/s and memory do,
so take those from `--jobs 1`.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

HEADS, WIDTH = 4, 128
GQA = {"kind": "gqa", "heads": HEADS, "kv_heads": HEADS, "head_dim": 32, "qk_norm": True, "rope": {"dims": 16}}
MLA = {"kind": "mla", "heads": HEADS, "kv_rank": 64, "nope_dim": 16, "v_dim": 32, "rope": {"dims": 16}}
LIGHTNING = {"kind": "lightning", "heads": HEADS, "head_dim": 32}


def dense(hidden: int) -> dict[str, Any]:
    return {"kind": "swiglu", "hidden": hidden}


def moe(hidden: int, shared: int) -> dict[str, Any]:
    return {"kind": "moe", "experts": 8, "top_k": 2, "hidden": hidden, "shared_hidden": shared}


# Widths are chosen so that active parameters agree within 2% (checked at start).
VARIANTS: dict[str, dict[str, Any]] = {
    "dense": {"pattern": "gqa/dense*4", "mixers": {"gqa": GQA}, "ffns": {"dense": dense(344)}},
    "moe": {"pattern": "gqa/moe*4", "mixers": {"gqa": GQA}, "ffns": {"moe": moe(112, 116)}},
    "mla": {"pattern": "mla/dense*4", "mixers": {"mla": MLA}, "ffns": {"dense": dense(370)}},
    "hybrid": {
        "pattern": "lightning/narrow*3 gqa/dense",
        "mixers": {"gqa": GQA, "lightning": LIGHTNING},
        "ffns": {"dense": dense(344), "narrow": dense(301)},
    },
    "residual": {
        "pattern": "gqa/dense/dual*4",
        "mixers": {"gqa": GQA},
        "ffns": {"dense": dense(344)},
        "residuals": {"dual": {"kind": "dual"}},
    },
    "mla+moe": {"pattern": "mla/moe*4", "mixers": {"mla": MLA}, "ffns": {"moe": moe(120, 126)}},
}


def run(variant: str, seed: int, text: Path, steps: int, threads: int) -> dict[str, Any]:
    import torch
    import torch.nn.functional as F

    from trivet.model import Transformer
    from trivet.spec import ModelSpec
    from trivet.train.data import TextDocuments
    from trivet.train.trainer import TrainConfig, train

    torch.set_num_threads(threads)
    characters = text.read_text()
    alphabet = {c: i for i, c in enumerate(sorted(set(characters)))}
    ids = torch.tensor([alphabet[c] for c in characters])
    cut = int(0.9 * len(ids))
    validation = ids[cut:]
    spec = ModelSpec(vocab_size=len(alphabet), d_model=WIDTH, context_length=64, **VARIANTS[variant])
    model = Transformer(spec, seed=seed)

    @torch.no_grad()
    def evaluate(model: Transformer) -> dict[str, float]:
        windows = validation[: (len(validation) - 1) // 64 * 64 + 1]
        x, y = windows[:-1].view(-1, 64), windows[1:].view(-1, 64)
        losses = [
            F.cross_entropy(model.logits(model(a)).flatten(0, 1), b.flatten(), reduction="sum").item()
            for a, b in zip(x.split(256), y.split(256), strict=True)
        ]
        return {"loss": sum(losses) / y.numel()}

    config = TrainConfig(
        steps=steps, rows=12, length=64, muon_lr=0.02, adam_lr=3e-3, warmup=50, decay_share=0.6, seed=seed,
        tensorboard=False, log_every=100, save_every_seconds=1e9,
    )  # fmt: skip
    documents = TextDocuments(ids[:cut], 64, seed)
    with tempfile.TemporaryDirectory() as out:
        began = time.perf_counter()
        summary = train(model, documents, config, Path(out), evaluate=evaluate)
        seconds = time.perf_counter() - began
    return {
        "variant": variant, "seed": seed, "steps": steps, "threads": threads, "loss": summary["eval/loss"], "seconds": seconds,
        "tokens_per_second": steps * 12 * 64 / seconds, "params": spec.num_params(),
        "active": spec.active_params(), "rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="nanoGPT's shakespeare_char/input.txt")
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path, help="a line of JSON a run; runs that it holds are not run again")
    parser.add_argument("--one", action="store_true", help="run one variant and seed here and print JSON")
    args = parser.parse_args()
    variants, seeds = args.variants.split(","), [int(s) for s in args.seeds.split(",")]
    if args.one:
        print(json.dumps(run(variants[0], seeds[0], args.text, args.steps, args.threads)))
        return

    known = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out and args.out.exists() else []
    done_before = {(r["variant"], r["seed"], r["steps"], r["threads"]): r for r in known}

    def job(pair: tuple[str, int]) -> dict[str, Any]:
        if (*pair, args.steps, args.threads) in done_before:
            return done_before[(*pair, args.steps, args.threads)]
        command = [sys.executable, __file__, "--one", "--variants", pair[0], "--seeds", str(pair[1])]
        command += ["--text", str(args.text), "--steps", str(args.steps), "--threads", str(args.threads)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr)
        result = json.loads(done.stdout.splitlines()[-1])
        if args.out:
            with args.out.open("a") as file:
                file.write(json.dumps(result) + "\n")
        print(f"{pair[0]:10s} seed {pair[1]}  loss {result['loss']:.4f}  {result['seconds']:.0f} s", flush=True)
        return result

    # seeds outermost: the variants of one seed run interleaved
    with ThreadPoolExecutor(args.jobs) as pool:
        results = list(pool.map(job, [(v, s) for s in seeds for v in variants]))
    print(f"\n{platform.processor() or platform.machine()}, {args.threads} threads a run, {args.jobs} at a time")
    print(f"{'variant':10s} {'params':>10s} {'active':>9s}  loss (mean, range of seeds)   tokens/s  peak MB")
    for v in variants:
        mine = [r for r in results if r["variant"] == v]
        losses = [r["loss"] for r in mine]
        speed, memory = (statistics.median(r[k] for r in mine) for k in ("tokens_per_second", "rss_mb"))
        print(f"{v:10s} {mine[0]['params']:10,d} {mine[0]['active']:9,d}  {statistics.mean(losses):.4f}"
              f"  [{min(losses):.4f}, {max(losses):.4f}]   {speed:8.0f} {memory:8.0f}")  # fmt: skip


if __name__ == "__main__":
    main()
