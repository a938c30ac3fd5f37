"""Generation tokens/s with a cache: Trivet against transformers' generate, same weights, greedy.

    python benchmarks/generate.py                       # batch 64, prompt 128, 64 new tokens
    python benchmarks/generate.py --batch 1 --shape both

Prefill is part of the time. Prompts are equally long, so transformers has no padding to carry. In
fp32 both must write the same tokens. The roofline of a step reads every weight and the cache once.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from common import DTYPES, arguments, machine, peer, seconds, take_turns, write
from peers import twin
from trivet.model import Transformer


@torch.inference_mode()
def generate(model: Transformer, prompt: Tensor, new: int) -> Tensor:
    """Greedy: prefill, then one token a row and step. -> [B, prompt+new]"""
    batch, length = prompt.shape
    caches = model.new_caches(batch, length + new)
    out = torch.cat((prompt, prompt.new_empty(batch, new)), 1)
    positions = torch.arange(length + new, device=prompt.device).expand(batch, -1)
    hidden = model(prompt, positions[:, :length], caches, span=length)
    for at in range(length, length + new):
        out[:, at] = model.logits(hidden[:, -1]).float().argmax(-1)  # bf16's argmax is slow on a CPU
        if at + 1 < length + new:
            hidden = model(out[:, at : at + 1], positions[:, at : at + 1], caches, span=at + 1)
    return out


def decode_roofline(model: Transformer, batch: int, context: int, bytes_per_s: float) -> float:
    """Seconds a step: the weights that a batch meets (all experts, at most) and the cache, read once."""
    size = model.embed.element_size()
    idle = model.spec.num_params() - model.spec.active_params() if batch == 1 else 0
    table = 0 if model.spec.tie_embeddings else model.embed.numel()  # the input table is a look-up
    weights = (model.spec.num_params() - idle - table) * size
    return (weights + batch * context * model.spec.cache_bytes_per_token(size)) / bytes_per_s


def measure(shape: str, dtype: str, args: argparse.Namespace, facts: dict[str, Any]) -> dict[str, Any]:
    theirs = peer(shape, args.device).to(DTYPES[dtype]).eval()
    ours = twin(theirs)
    g = torch.Generator().manual_seed(0)
    prompt = torch.randint(1, 8192, (args.batch, args.prompt), generator=g).to(args.device)
    mask = torch.ones_like(prompt)

    def their_generate() -> Tensor:
        return theirs.generate(
            prompt, attention_mask=mask, max_new_tokens=args.new, min_new_tokens=args.new, do_sample=False
        )

    sides: dict[str, Callable[[], Tensor]] = {
        "trivet": lambda: generate(ours, prompt, args.new),
        "transformers": their_generate,
    }
    if dtype == "fp32":
        same = float((sides["trivet"]() == sides["transformers"]()).float().mean())
        if same < 0.98:  # a near tie may be broken the other way, and the row goes on differently
            raise SystemExit(f"{shape}: only {same:.1%} of the tokens agree: nothing to compare.")
    times = take_turns(sides, args.rounds, args.device)
    speed = {name: args.batch * args.new / t for name, t in times.items()}
    prefill = min(seconds(lambda: generate(ours, prompt, 1), args.device) for _ in range(3))
    step = (times["trivet"] - prefill) / (args.new - 1)
    floor = decode_roofline(ours, args.batch, args.prompt + args.new // 2, facts["bytes_per_s"])
    ratio = speed["trivet"] / speed["transformers"]
    print(
        f"{shape:6} {dtype:5} batch {args.batch:3}  trivet {speed['trivet']:7.0f} tok/s (prefill {prefill * 1e3:.0f} ms, "
        f"step {step * 1e3:.1f} ms, read roofline {floor * 1e3:.1f} ms)  transformers {speed['transformers']:7.0f} tok/s  "
        f"ratio {ratio:.2f}"
    )
    return {"shape": shape, "dtype": dtype, "batch": args.batch, "prompt": args.prompt, "new": args.new,
            "ratio": ratio, "step_s": step, "prefill_s": prefill, "roofline_step_s": floor} | speed  # fmt: skip


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--shape", choices=["dense", "moe", "both"], default="dense")
    parser.add_argument("--dtypes", default="fp32,bf16")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=64)
    args = parser.parse_args()
    facts = machine(args)
    shapes = ["dense", "moe"] if args.shape == "both" else [args.shape]
    results = [measure(shape, dtype, args, facts) for shape in shapes for dtype in args.dtypes.split(",")]
    write(args.out, {"benchmark": "generate", "machine": facts, "results": results})


if __name__ == "__main__":
    main()
