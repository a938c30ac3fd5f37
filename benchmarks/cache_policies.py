"""What a cache policy costs in right answers and saves in bytes: accuracy against bytes, on trained tiny models.

    python benchmarks/cache_policies.py --threads 1

A long thought in small: 512 tokens of filler. In the first quarter, the problem, stand eight notes, one token each, of a
key and its value; in the rest, the thought, sixteen times one of the keys, which must be followed by its value. Models of GQA and MLA layers, and MLA with nested ranks, are trained on
it, then read 128 other texts through the caches of each policy. A text counts with its share of right values, 95%
intervals by bootstrap over texts. Bytes are of one text of 512 tokens in all layers, by the policy's arithmetic.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from common import arguments, machine, write
from trivet.engine.calibrate import calibrate
from trivet.engine.policy import Place, Policy, RankByAge, parse_policy
from trivet.measure.stats import bootstrap
from trivet.model import Transformer, load_model, save_model
from trivet.spec import GQA, MLA, ModelSpec, Rope, SwiGLU
from trivet.train.nested import shortened
from trivet.train.optim import Optimizer

FILLER, KEYS, VALUES = 32, 32, 32
NOTES, ASKED, LENGTH, ROWS = 8, 16, 512, 8
PIECE = 8  # tokens of a call: no policy below works in smaller blocks
WHOLE = ("full", "int8", "window:252+4", "window:124+4", "window:60+4", "snapkv:256/8", "snapkv:128/8", "snapkv:64/8",
         "layers:216-32+4", "layers:32-216+4", "layers:108-16+4", "layers:16-108+4")  # fmt: skip
LATENT = ("lowrank:32/32", "lowrank:32/24", "lowrank:32/16", "lowrank:32/8", "lowrank:32/4", "lowrank:32/24/224/8",
          "lowrank:128/16")  # fmt: skip


NESTED = 4  # the least rank that "nested", MLA trained with nested ranks, is shortened to


def spec_of(kind: str) -> ModelSpec:
    mixers = {
        "gqa": GQA(heads=4, kv_heads=2, head_dim=32, rope=Rope(dims=32), qk_norm=True),
        "mla": MLA(heads=4, kv_rank=48, nope_dim=32, v_dim=32, rope=Rope(dims=16)),
    }
    return ModelSpec(
        vocab_size=FILLER + KEYS + VALUES + KEYS * VALUES, d_model=64, pattern="gqa/dense*3" if kind == "gqa" else "mla/dense*3", context_length=LENGTH,
        mixers=mixers, ffns={"dense": SwiGLU(hidden=128)},
    )  # fmt: skip


def texts(count: int, length: int, seed: int) -> tuple[Tensor, Tensor]:
    """tokens [N,T], and bool [N,T-1]: where a value follows that has been told before."""
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, FILLER, (count, length), generator=g)
    keys = torch.rand(count, KEYS, generator=g).argsort(-1)[:, :NOTES]
    values = torch.randint(0, VALUES, (count, NOTES), generator=g)
    early, late = length // 4, (length - length // 4) // 2  # places for a note, and for a key with its value
    told = torch.rand(count, early, generator=g).argsort(-1)[:, :NOTES]
    again = early + 2 * torch.rand(count, late, generator=g).argsort(-1)[:, :ASKED]
    which = torch.randint(0, NOTES, (count, ASKED), generator=g)
    asked = torch.zeros(count, length - 1, dtype=torch.bool)
    tokens.scatter_(1, told, FILLER + KEYS + VALUES + keys * VALUES + values)
    tokens.scatter_(1, again, FILLER + keys.gather(1, which))
    tokens.scatter_(1, again + 1, FILLER + KEYS + values.gather(1, which))
    return tokens, asked.scatter_(1, again, True)


def trained(kind: str, seed: int, steps: int, folder: Path) -> Transformer:
    """A model that has seen such texts of up to LENGTH tokens; kept in `folder`, and taken from there."""
    place = folder / f"{kind}{seed}-{steps}"
    if (place / "model.safetensors").exists():
        return load_model(place)
    model, began = Transformer(spec_of(kind), seed=seed), time.perf_counter()
    optimizer = Optimizer(model.optimizer_groups(), muon_lr=0.02, adam_lr=0.01)
    for step in range(steps):
        shorter = 4 if step < 0.4 * steps else 2 if step < 0.6 * steps else 1
        tokens, asked = texts(ROWS * shorter, LENGTH // shorter, 10**6 * (seed + 1) + step)
        with shortened(model, NESTED if kind == "nested" else 0, step):
            hidden = model(tokens)[:, :-1][asked]
            loss = F.cross_entropy(model.logits(hidden), tokens[:, 1:][asked])
            optimizer.zero_grad()
            loss.backward()
        optimizer.step(min(1.0, (step + 1) / 50, (steps - step) / (0.4 * steps)))
        if step % 50 == 0:
            print(
                f"{kind} seed {seed} step {step:5d}  loss {loss.item():.3f}  {time.perf_counter() - began:.0f} s",
                flush=True,
            )
    place.mkdir(parents=True, exist_ok=True)
    save_model(model, place)
    return model


@torch.no_grad()
def right(model: Transformer, policy: Policy, tokens: Tensor, asked: Tensor) -> list[float]:
    """Share of right values of each text, read through the policy's caches."""
    policy.check(model.spec)
    count, length, layers = *tokens.shape, len(model.layers)
    caches = [
        policy.new_cache(layer.mixer, Place(i, layers, count, length, length, torch.float32, tokens.device))  # type: ignore[arg-type]
        for i, layer in enumerate(model.layers)
    ]
    found = []
    for start in range(0, length, PIECE):
        at = torch.arange(start, min(start + PIECE, length)).expand(count, -1)
        hidden = model(tokens[:, start : start + PIECE], at, caches, int(at.max()) + 1)
        found.append(model.logits(hidden).argmax(-1))
    same = (torch.cat(found, 1)[:, :-1] == tokens[:, 1:]) & asked
    return (same.sum(1) / asked.sum(1)).tolist()


def measure(
    model: Transformer, name: str, texts_: tuple[Tensor, Tensor], basis: Sequence[Any] | None
) -> dict[str, Any]:
    policy = parse_policy(name)
    if isinstance(policy, RankByAge):
        assert basis is not None
        policy = policy.with_bases(basis)
    shares = right(model, policy, *texts_)
    low, high = bootstrap(shares)
    return {
        "policy": name, "bytes": policy.row_bytes(model.spec, LENGTH, 4), "right": sum(shares) / len(shares),
        "low": low, "high": high,
    }  # fmt: skip


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--kinds", default="gqa,mla,nested")
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--count", type=int, default=128, help="texts that are read")
    parser.add_argument("--models", type=Path, default=Path("runs/cache_policies"), help="where models are kept")
    args: argparse.Namespace = parser.parse_args()
    facts, results = machine(args), []
    for kind in args.kinds.split(","):
        for seed in (int(s) for s in args.seeds.split(",")):
            model = trained(kind, seed, args.steps, args.models)
            unseen = texts(args.count, LENGTH, 10**9)
            basis = calibrate(model, texts(32, LENGTH, 10**9 + 1)[0].tolist()) if kind != "gqa" else None
            full = parse_policy("full").row_bytes(model.spec, LENGTH, 4)
            for name in (WHOLE if kind != "nested" else WHOLE[:1]) + (LATENT if kind != "gqa" else ()):
                r = measure(model, name, unseen, basis)
                results.append({"kind": kind, "seed": seed, **r})
                print(f"{kind} seed {seed}  {name:20s} {r['bytes'] / full:6.1%}  {r['right']:.3f} [{r['low']:.3f}, {r['high']:.3f}]", flush=True)  # fmt: skip
    write(args.out, {"machine": facts, "results": results})


if __name__ == "__main__":
    main()
