"""Training tokens/s, one step = forward + backward + AdamW, Trivet against transformers.

    python benchmarks/train_step.py                     # both shapes, fp32 and bf16
    python benchmarks/train_step.py --shape dense --rows 16 --length 512

Same shape, same starting weights, same tokens, the same fused AdamW; the first losses must agree.
    fp32            fp32 weights
    bf16 autocast   fp32 weights, matrix products in bf16
    bf16 weights    everything in bf16, optimizer state too
"""

from __future__ import annotations

import argparse
import contextlib
import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from common import DTYPES, arguments, machine, peer, take_turns, write
from peers import twin
from trivet.train.losses import head_loss

MODES = {"fp32": ("fp32", False), "bf16 autocast": ("fp32", True), "bf16 weights": ("bf16", False)}
DEFAULT_ROWS = {"dense": 4, "moe": 1}


def stepper(model: nn.Module, loss_of: Callable[[], Tensor], autocast: bool, device: str) -> Callable[[], float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> float:
        context: Any = torch.autocast(device, torch.bfloat16) if autocast else contextlib.nullcontext()
        with context:
            loss = loss_of()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def measure(shape: str, modes: list[str], args: argparse.Namespace, facts: dict[str, Any]) -> list[dict[str, Any]]:
    rows, length = args.rows or DEFAULT_ROWS[shape], args.length
    tokens = torch.randint(0, 8192, (rows, length), generator=torch.Generator().manual_seed(0)).to(args.device)
    targets = torch.full_like(tokens, -100)
    targets[:, :-1] = tokens[:, 1:]
    original, results = peer(shape, args.device), []
    for mode in modes:
        dtype, autocast = MODES[mode]
        theirs = copy.deepcopy(original).to(DTYPES[dtype]).train()
        ours = twin(theirs)
        spec = ours.spec

        def our_loss(ours: Any = ours) -> Tensor:
            total, n = head_loss(ours(tokens).flatten(0, 1), ours.head_weight, targets.flatten())
            return total / n

        def their_loss(theirs: Any = theirs) -> Tensor:
            return theirs(tokens, labels=tokens, use_cache=False).loss

        sides = {
            "trivet": stepper(ours, our_loss, autocast, args.device),
            "transformers": stepper(theirs, their_loss, autocast, args.device),
        }
        first = {name: step() for name, step in sides.items()}
        if abs(first["trivet"] / first["transformers"] - 1) > (1e-4 if mode == "fp32" else 0.02):
            raise SystemExit(f"{shape} {mode}: the first losses differ, {first}: nothing to compare.")
        times = take_turns(sides, args.rounds, args.device)
        speed = {name: rows * length / t for name, t in times.items()}
        ratio = speed["trivet"] / speed["transformers"]
        peak = facts["flops_fp32" if mode == "fp32" else "flops_bf16"]
        share = speed["trivet"] * spec.training_flops_per_token(length) / peak
        print(
            f"{shape:6} {mode:14} {rows}x{length}  trivet {speed['trivet']:8.0f} tok/s ({share:4.0%} of matmul peak)"
            f"  transformers {speed['transformers']:8.0f} tok/s  ratio {ratio:.2f}"
        )
        results.append({"shape": shape, "mode": mode, "rows": rows, "length": length, "ratio": ratio} | speed)
    print(f"       {spec.num_params() / 1e6:.1f}M parameters, {spec.active_params() / 1e6:.1f}M active")
    return results


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--shape", choices=["dense", "moe", "both"], default="both")
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--rows", type=int)
    parser.add_argument("--length", type=int, default=512)
    args = parser.parse_args()
    facts = machine(args)
    shapes = ["dense", "moe"] if args.shape == "both" else [args.shape]
    results = [r for shape in shapes for r in measure(shape, args.modes.split(","), args, facts)]
    write(args.out, {"benchmark": "train_step", "machine": facts, "results": results})


if __name__ == "__main__":
    main()
