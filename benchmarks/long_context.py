"""What happens past the trained length, and what a long prompt costs.

    python benchmarks/long_context.py retrieval --seeds 0,1,2 --models DIR    # train at 256, ask at 256 to 2,048
    python benchmarks/long_context.py prefill --lengths 1024,4096,16384,32768

retrieval  Filler tokens, among them eight that each hold a key and a value; at the end the eight keys in
           random order, each to be followed by its value. The same weights are read as they are, and
           extended at load time: by YaRN, by dual chunks (DCA), by both (each the square root of the factor),
           and by DCA along few lines (MInference). 95% intervals: bootstrap over texts.
prefill    One prompt through `prefill` in pieces, random weights: full attention, the same along chosen lines
           (MInference), dual chunks, and three of four layers lightning. Ratios to full attention, sides
           taking turns.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from common import arguments, machine, take_turns, write
from trivet.measure.stats import bootstrap
from trivet.model import Transformer, load_model, save_model
from trivet.model.prefill import prefill
from trivet.model.prompt import Kept, Prompt, Sparse
from trivet.spec import GQA, Lightning, ModelSpec, Rope, SwiGLU, with_chunks, with_yarn
from trivet.train.optim import Optimizer

# --- retrieval ----------------------------------------------------------------------------------------
FILLER, KEYS, VALUES, NEEDLES = 32, 32, 32, 8
TRAINED, FACTORS, ROWS = 256, (1, 2, 4, 8), 32
RETRIEVER = ModelSpec(
    vocab_size=FILLER + KEYS + VALUES + KEYS * VALUES, d_model=64, pattern="gqa/dense*2", context_length=TRAINED,
    mixers={"gqa": GQA(heads=4, kv_heads=2, head_dim=32, rope=Rope(dims=32), qk_norm=True)},
    ffns={"dense": SwiGLU(hidden=128)},
)  # fmt: skip


def texts(count: int, length: int, seed: int) -> tuple[Tensor, Tensor]:
    """tokens [N,T], and the places of the keys that are asked for; an answer stands behind each."""
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, FILLER, (count, length), generator=g)
    keys = torch.rand(count, KEYS, generator=g).argsort(-1)[:, :NEEDLES]
    values = torch.randint(0, VALUES, (count, NEEDLES), generator=g)
    body = length - 2 * NEEDLES
    where = torch.rand(count, body, generator=g).argsort(-1)[:, :NEEDLES]
    tokens.scatter_(1, where, FILLER + KEYS + VALUES + keys * VALUES + values)
    asked = torch.arange(body, length, 2)
    order = torch.rand(count, NEEDLES, generator=g).argsort(-1)
    tokens[:, asked] = FILLER + keys.gather(1, order)
    tokens[:, asked + 1] = FILLER + KEYS + values.gather(1, order)
    return tokens, asked


def trained(seed: int, steps: int, folder: Path) -> Transformer:
    """A retriever that has never seen more than TRAINED tokens; kept in `folder`, and taken from there."""
    place = folder / f"seed{seed}-{steps}"
    if (place / "model.safetensors").exists():
        return load_model(place)
    model = Transformer(RETRIEVER, seed=seed)
    optimizer = Optimizer(model.optimizer_groups(), muon_lr=0.02, adam_lr=0.01)
    for step in range(steps):
        length = TRAINED // 4 if step < 0.4 * steps else TRAINED // 2 if step < 0.5 * steps else TRAINED
        tokens, asked = texts(ROWS, length, 10**6 * (seed + 1) + step)
        logits = model.logits(model(tokens)[:, asked])
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, asked + 1].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step(min(1.0, (step + 1) / 50, (steps - step) / (0.4 * steps)))
        if step % 50 == 0:
            print(f"seed {seed} step {step:5d}  {length} tokens  loss {loss.item():.3f}", flush=True)
    place.mkdir(parents=True, exist_ok=True)
    save_model(model, place)
    return model


def yarn(spec: ModelSpec, factor: float) -> ModelSpec:
    return with_yarn(spec, factor)[0]


def chunks(spec: ModelSpec, factor: float) -> ModelSpec:
    return with_chunks(spec, factor)[0]


def both(spec: ModelSpec, factor: float) -> ModelSpec:
    return chunks(yarn(spec, math.sqrt(factor)), math.sqrt(factor))


WAYS: dict[str, Callable[[ModelSpec, float], ModelSpec]] = {
    "as it is": lambda spec, factor: spec, "YaRN": yarn, "DCA": chunks, "DCA+YaRN": both,
}  # fmt: skip


LINES = Sparse(vertical=64, slash=32, sinks=4, local=16, measure=True)


@torch.no_grad()
def answers(model: Transformer, tokens: Tensor, asked: Tensor, sparse: Sparse | None) -> tuple[list[float], Kept]:
    """Share of right answers of each text; with `sparse` the text is one piece of a prompt."""
    right, kept = [], Kept()
    for some in tokens.split(8):
        if sparse is None:
            hidden = model(some)
        else:
            count, length = some.shape
            prompt = Prompt(0, (length,) * count, sparse, kept)
            at = torch.arange(length).expand(count, -1)
            hidden = model(some, at, model.new_caches(count, length), length, prompt=prompt)
        right += (model.logits(hidden[:, asked]).argmax(-1) == some[:, asked + 1]).float().mean(1).tolist()
    return right, kept


def retrieval(args: argparse.Namespace) -> list[dict[str, Any]]:
    results = []
    for seed in (int(s) for s in args.seeds.split(",")):
        model = trained(seed, args.steps, args.models)
        for factor in FACTORS:
            tokens, asked = texts(args.count, TRAINED * factor, 10**9 + factor)
            for name, extend in (WAYS | {"DCA lines": chunks}).items():
                longer = model if factor == 1 else model.with_spec(extend(model.spec, factor))
                right, kept = answers(longer, tokens, asked, LINES if name == "DCA lines" else None)
                (low, high), share = bootstrap(right), sum(right) / len(right)
                results.append({
                    "seed": seed, "length": TRAINED * factor, "way": name, "right": share, "low": low, "high": high,
                    "pairs": kept.share, "recovered": kept.recovered,
                })  # fmt: skip
                lines = (
                    ""
                    if kept.recovered is None
                    else f"  {kept.share:.1%} of the pairs, {kept.recovered:.1%} of the mass"
                )
                print(f"seed {seed}  {TRAINED * factor:5d} tokens  {name:9s} {share:.3f} [{low:.3f}, {high:.3f}]{lines}", flush=True)  # fmt: skip
    return results


# --- prefill ------------------------------------------------------------------------------------------
def reader(pattern: str, length: int) -> Transformer:
    """A model of a realistic shape in small: heads of 64, key heads shared by four."""
    gqa = GQA(heads=8, kv_heads=2, head_dim=64, rope=Rope(dims=64))
    spec = ModelSpec(
        vocab_size=1024, d_model=256, pattern=pattern, context_length=length, ffns={"dense": SwiGLU(hidden=512)},
        mixers={"gqa": gqa, "lightning": Lightning(heads=8, head_dim=32)},
    )  # fmt: skip
    model = Transformer(spec)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("o_proj.weight"):  # fresh ones are zero
                p.normal_(0, p.shape[-1] ** -0.5, generator=g)
    return model


@torch.no_grad()
def prefill_times(args: argparse.Namespace) -> list[dict[str, Any]]:
    lines = Sparse(vertical=args.vertical, slash=args.slash)
    results = []
    for length in (int(n) for n in args.lengths.split(",")):
        full, hybrid = reader("gqa/dense*4", length), reader("lightning/dense*3 gqa/dense", length)
        chunked = full.with_spec(with_chunks(full.spec.model_copy(update={"context_length": length // 4}), 4)[0])
        tokens = torch.randint(0, 1024, (1, length), generator=torch.Generator().manual_seed(1)).to(args.device)
        caches = {"full": full.new_caches(1, length), "hybrid": hybrid.new_caches(1, length)}
        kept = {}

        def read(name: str, model: Transformer, memory: str, sparse: Sparse | None = None) -> None:
            kept[name] = prefill(model, tokens, caches[memory], args.chunk, sparse=sparse).kept  # noqa: B023

        sides: dict[str, Callable[[], None]] = {
            "full": partial(read, "full", full, "full"), "sparse": partial(read, "sparse", full, "full", lines),
            "DCA": partial(read, "DCA", chunked, "full"), "DCA sparse": partial(read, "DCA sparse", chunked, "full", lines),
            "hybrid": partial(read, "hybrid", hybrid, "hybrid"),
        }  # fmt: skip
        times = take_turns(sides, args.rounds, args.device)
        measured = Sparse(vertical=args.vertical, slash=args.slash, measure=True)
        recovered = prefill(full, tokens, caches["full"], args.chunk, sparse=measured).kept.recovered
        results.append({"length": length, "share": kept["sparse"].share, "recovered": recovered, **times})
        ratios = "  ".join(f"{name} {times['full'] / t:.2f}x" for name, t in times.items() if name != "full")
        mass = "" if recovered is None else f", {recovered:.1%} of the mass"
        print(f"{length:6d} tokens  full {times['full']:.2f} s  {ratios}  ({kept['sparse'].share:.1%} of the pairs{mass})", flush=True)  # fmt: skip
    return results


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("what", choices=["retrieval", "prefill"])
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", type=int, default=500, help="training steps of a retriever")
    parser.add_argument("--count", type=int, default=128, help="texts a length")
    parser.add_argument("--models", type=Path, default=Path("runs/long_context"), help="where retrievers are kept")
    parser.add_argument("--lengths", default="1024,2048,4096,8192,16384,32768")
    parser.add_argument("--chunk", type=int, default=2048, help="tokens of a piece")
    parser.add_argument("--vertical", type=int, default=512)
    parser.add_argument("--slash", type=int, default=128)
    args = parser.parse_args()
    facts = machine(args)
    results = retrieval(args) if args.what == "retrieval" else prefill_times(args)
    write(args.out, {"machine": facts, "results": results})


if __name__ == "__main__":
    main()
