"""Which form of the expert sum is faster when, and what sparse experts cost against a dense ffn.

    python benchmarks/moe_forms.py

1. `fused` against `sorted_` over tokens and shapes, forward and forward + backward. The rule in
   trivet/model/ffn.py allows `fused` so much needless work for each expert's products that it saves
   (NEEDLESS, one constant a device and number size); the best constant loses the least time over all measured
   points (geometric mean of time / better form's time).
2. A MoE model against a dense one of equal active parameters, training tokens/s (goal >= 0.7x).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from common import DTYPES, arguments, machine, take_turns, write
from trivet.model import Transformer, ffn
from trivet.model.ffn import fused, pick_form, sorted_
from trivet.spec import GQA, ModelSpec, MoE, Rope, SwiGLU
from trivet.train.losses import head_loss

SHAPES = [(8, 2, 112, 128), (16, 4, 64, 256), (32, 4, 256, 512), (64, 6, 128, 256)]  # experts, k, width, D
TOKENS = [1, 2, 4, 8, 16, 32, 64, 256, 1024, 4096, 16384]
LARGEST = {"cpu": 2**31, "cuda": 2**36}  # products of `fused` beyond which it is far behind, and slow to measure


def work(form: Callable[..., Any], leaves: list[torch.Tensor], chosen: torch.Tensor, train: bool) -> Callable[[], None]:
    x, gates, gate_up, down = leaves

    def once() -> None:
        with torch.set_grad_enabled(train):
            y = form(x, chosen, gates, gate_up, down)
        if train:
            torch.autograd.grad(y, leaves, y.detach())

    def repeated() -> None:
        for _ in range(max(1, 256 // len(x) // 8)):  # long enough for the clock
            once()

    return repeated


def forms(args: Any, dtype: torch.dtype, train: bool) -> list[dict[str, Any]]:
    points = []
    for experts, k, hidden, d in SHAPES:
        for tokens in TOKENS:
            if tokens * experts * hidden * d > LARGEST[torch.device(args.device).type]:
                continue
            g = torch.Generator().manual_seed(0)
            shapes = [(tokens, d), (tokens, k), (experts, 2, hidden, d), (experts, hidden, d)]
            leaves = [(torch.randn(s, generator=g) * 0.1).to(args.device, dtype).requires_grad_(train) for s in shapes]
            chosen = torch.rand(tokens, experts, generator=g).topk(k).indices.to(args.device)
            sides = {f.__name__: work(f, leaves, chosen, train) for f in (fused, sorted_)}
            t = take_turns(sides, args.rounds, args.device)
            points.append({"experts": experts, "k": k, "width": hidden, "d": d, "tokens": tokens,
                           "bytes": dtype.itemsize, "device": torch.device(args.device).type, "fused_over_sorted": t["fused"] / t["sorted_"]})  # fmt: skip
    return points


def loss_of(points: list[dict[str, Any]], constant: int) -> float:
    """Geometric mean of the rule's time over the better form's, were the rule's constant this one."""
    before, total = dict(ffn.NEEDLESS), 0.0
    for p in points:
        ffn.NEEDLESS[p["device"], p["bytes"]] = constant
        spec = MoE(experts=p["experts"], top_k=p["k"], hidden=p["width"])
        r = math.log(p["fused_over_sorted"])
        form = pick_form(spec, p["d"], p["tokens"], p["bytes"], p["device"])
        total += max(r, 0.0) if form is fused else max(-r, 0.0)
    ffn.NEEDLESS.update(before)
    return math.exp(total / len(points))


def report(name: str, points: list[dict[str, Any]]) -> dict[str, Any]:
    print(f"\n{name}: time of fused / time of sorted")
    print("experts  k  width    D |" + "".join(f"{n:>7}" for n in TOKENS) + "  tokens")
    for e, k, f, d in SHAPES:
        row = {p["tokens"]: p["fused_over_sorted"] for p in points if (p["experts"], p["k"], p["width"]) == (e, k, f)}
        print(f"{e:7} {k:2} {f:6} {d:4} |" + "".join(f"{row[n]:7.2f}" if n in row else "      -" for n in TOKENS))
    choices = {2**i: loss_of(points, 2**i) for i in range(10, 28)}
    best, now = min(choices, key=lambda c: choices[c]), ffn.NEEDLESS[points[0]["device"], points[0]["bytes"]]
    print(
        f"NEEDLESS 2^{now.bit_length() - 1} loses {choices[now] - 1:.1%}; best 2^{best.bit_length() - 1} loses "
        f"{choices[best] - 1:.1%}; never fused {loss_of(points, 0) - 1:.1%}, always {loss_of(points, 2**60) - 1:.1%}"
    )
    return {"name": name, "points": points, "best": best, "loss": {str(c): v for c, v in choices.items()}}


def moe_against_dense(args: Any, facts: dict[str, Any]) -> list[dict[str, Any]]:
    d, rows, length, results = 256, 4, 256, []
    mixer = GQA(heads=4, kv_heads=2, head_dim=64, rope=Rope(dims=64), qk_norm=True)
    moe = MoE(experts=16, top_k=3, hidden=192, shared_hidden=192)
    dense = SwiGLU(hidden=(moe.active_params(d) // (3 * d)) // 8 * 8)
    tokens = torch.randint(0, 4096, (rows, length)).to(args.device)
    for name, dtype in DTYPES.items():
        sides, active = {}, {}
        for kind, part in {"moe": moe, "dense": dense}.items():
            spec = ModelSpec(vocab_size=4096, d_model=d, pattern="g/f*4", mixers={"g": mixer}, ffns={"f": part})
            model = Transformer(spec).to(args.device, dtype)

            def step(model: Transformer = model) -> None:
                loss, n = head_loss(model(tokens)[:, :-1].flatten(0, 1), model.head_weight, tokens[:, 1:].flatten())
                (loss / n).backward()
                model.zero_grad(set_to_none=True)

            sides[kind], active[kind] = step, spec.active_params()
        t = take_turns(sides, args.rounds, args.device)
        ratio = t["dense"] / t["moe"]
        print(
            f"{name}: MoE {rows * length / t['moe']:.0f} tok/s, dense {rows * length / t['dense']:.0f} tok/s at "
            f"{active['moe'] / 1e6:.2f}M / {active['dense'] / 1e6:.2f}M active: {ratio:.2f}x (goal 0.7x)"
        )
        results.append({"dtype": name, "ratio": ratio, "seconds": t})
    return results


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--dtypes", default="fp32,bf16")
    args = parser.parse_args()
    facts = machine(args)
    tables = [
        report(f"{dtype}, {'forward + backward' if train else 'forward'}", forms(args, DTYPES[dtype], train))
        for dtype in args.dtypes.split(",")
        for train in (False, True)
    ]
    print()
    dense = moe_against_dense(args, facts)
    write(args.out, {"benchmark": "moe_forms", "machine": facts, "forms": tables, "moe_against_dense": dense})


if __name__ == "__main__":
    main()
