"""Generation tokens/s with a cache: Trivet against transformers' generate, llama.cpp and vLLM, same weights, greedy.

    python benchmarks/generate.py                       # batch 64, prompt 128, 64 new tokens
    python benchmarks/generate.py --batch 1 --shape dense,moe
    python benchmarks/generate.py --batch 1,8,64 --shape dense,qwen-moe --peers llama.cpp
    python benchmarks/generate.py --threads 1 --cpu-time --vllm vllm/bin/python     # see vllm_side.py

Prefill is part of the time. Prompts are equally long, so transformers has no padding to carry.
What all write must be what our model finds likeliest. The roofline of a step reads every weight and the cache once.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from common import DTYPES, arguments, machine, peer, take_turns, write
from common import peers as processes
from llama import Llama, present
from peers import twin
from trivet.model import Transformer
from vllm_side import Vllm

SHAPES = ("dense", "dense-0.6b", "moe", "qwen-moe")
# Logits of these models have a standard deviation of 1, so that other tokens would have a regret of 4. In bf16 a choice of
# experts may be a tie that each side breaks its own way.
TOLERANCE = {"fp32": 0.02, "bf16": 0.1, "bf16, experts": 0.3}
MOE_SHAPES = ("moe", "qwen-moe")
LLAMA_SHAPES = ("dense", "dense-0.6b", "qwen-moe")  # that benchmarks/llama.py can write


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


@torch.inference_mode()
def regret(model: Transformer, written: Tensor, prompt: int) -> float:
    """By how much, on average, the tokens behind the prompt have lower logits in our model than its own choice would.

    0 if all are its choice. A near tie may be broken the other way and the text goes on differently, at no regret.
    """
    logits = torch.cat([model.logits(model(row[None]))[0, prompt - 1 : -1].float() for row in written[:4]])
    chosen = logits.gather(-1, written[:4, prompt:].flatten().unsqueeze(-1)).squeeze(-1)
    return float((logits.amax(-1) - chosen).mean())


def decode_roofline(model: Transformer, batch: int, context: int, bytes_per_s: float) -> float:
    """Seconds a step: the weights that a batch meets (all experts, at most) and the cache, read once."""
    size = model.embed.element_size()
    idle = model.spec.num_params() - model.spec.active_params() if batch == 1 else 0
    table = 0 if model.spec.tie_embeddings else model.embed.numel()  # the input table is a look-up
    weights = (model.spec.num_params() - idle - table) * size
    return (weights + batch * context * model.spec.cache_bytes_per_token(size)) / bytes_per_s


def measure(shape: str, dtype: str, args: argparse.Namespace, facts: dict[str, Any]) -> list[dict[str, Any]]:
    theirs = peer(shape, args.device).to(DTYPES[dtype]).eval()
    ours, batches = twin(theirs), [int(batch) for batch in args.batch.split(",")]
    if not args.vllm:
        return [side_by_side(shape, dtype, batch, theirs, ours, None, args, facts) for batch in batches]
    vllm = Vllm(args.vllm, theirs, max(batches), args.prompt + args.new, args.threads)
    processes.append(vllm.pid)
    results = [side_by_side(shape, dtype, batch, theirs, ours, vllm, args, facts) for batch in batches]
    processes.remove(vllm.pid)
    vllm.close()
    return results


def side_by_side(
    shape: str, dtype: str, batch: int, theirs: Any, ours: Transformer, vllm: Vllm | None, args: argparse.Namespace,
    facts: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    g = torch.Generator().manual_seed(0)
    prompt = torch.randint(1, 8192, (batch, args.prompt), generator=g).to(args.device)
    mask = torch.ones_like(prompt)

    def their_generate(new: int) -> Tensor:
        return theirs.generate(prompt, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False)

    sides: dict[str, Callable[[int], Tensor]] = {"trivet": lambda new: generate(ours, prompt, new)}
    if "transformers" in args.peers:
        sides["transformers"] = their_generate
    if "llama.cpp" in args.peers and shape in LLAMA_SHAPES:
        llama = Llama(theirs, batch, args.prompt + args.new, args.threads)
        sides["llama.cpp"] = lambda new: llama.generate(prompt, new)
    if vllm is not None:
        sides["vllm"] = lambda new: torch.cat((prompt, torch.tensor(vllm.generate(prompt.tolist(), new))), 1)
    allowed = TOLERANCE[dtype if dtype == "fp32" or shape not in MOE_SHAPES else "bf16, experts"]
    regrets = {name: regret(ours, side(args.new), args.prompt) for name, side in sides.items()}
    for name, worst in regrets.items():
        if worst > allowed:
            raise SystemExit(f"{shape} {dtype}: {name} writes other tokens (regret {worst:.3f}): nothing to compare.")
    works = {name: partial(side, args.new) for name, side in sides.items()}
    works |= {f"{name}, prefill": partial(side, 1) for name, side in sides.items()}
    times = take_turns(works, args.rounds, args.device)
    if "llama.cpp" in sides:
        llama.close()
    floor = decode_roofline(ours, batch, args.prompt + args.new // 2, facts["bytes_per_s"])
    found: dict[str, Any] = {"shape": shape, "dtype": dtype, "batch": batch, "prompt": args.prompt, "new": args.new}
    print(f"{shape:10} {dtype:5} batch {batch:3}  read roofline {floor * 1e3:.1f} ms a step", flush=True)
    for name in sides:
        step = (times[name] - times[f"{name}, prefill"]) / (args.new - 1)
        speed, ratio = batch * args.new / times[name], times[name] / times["trivet"]
        print(f"    {name:12} {speed:7.0f} tok/s  prefill {times[f'{name}, prefill'] * 1e3:6.0f} ms  step {step * 1e3:7.2f} ms  "
              f"trivet is {ratio:.2f}x  regret {regrets[name]:.3f}", flush=True)  # fmt: skip
        found[name] = {"tokens_per_s": speed, "step_s": step, "prefill_s": times[f"{name}, prefill"], "ratio": ratio,
                       "regret": regrets[name]}  # fmt: skip
    return found | {"roofline_step_s": floor}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--shape", default="dense", help=f"some of {','.join(SHAPES)}")
    parser.add_argument("--dtypes", default="fp32,bf16")
    parser.add_argument("--batch", default="64")
    parser.add_argument("--peers", default="transformers,llama.cpp")
    parser.add_argument("--vllm", help="the Python of an environment with vLLM, which is then a peer, too")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=64)
    args = parser.parse_args()
    facts = machine(args)
    args.peers = present(args.peers)
    results = [
        result for shape in args.shape.split(",") for dtype in args.dtypes.split(",")
        for result in measure(shape, dtype, args, facts)
    ]  # fmt: skip
    write(args.out, {"benchmark": "generate", "machine": facts, "results": results})


if __name__ == "__main__":
    main()
