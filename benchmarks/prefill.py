"""Reading one long prompt: Trivet against transformers, llama.cpp and vLLM on the same weights.

    python benchmarks/prefill.py                                        # Qwen3 5.8M; 1k to 16k tokens, fp32 and bf16
    python benchmarks/prefill.py --shape dense,moe,minimax --threads 1 --cpu-time --rounds 2
    python benchmarks/prefill.py --lengths 32768 --dtypes bf16 --rounds 1 --vllm vllm/bin/python

Time until the first token. `moe` has DeepSeek's latent attention, in `minimax` three of four layers are lightning. Pieces are
those of our engine. The token that each side writes must be one that our model finds likeliest, or nearly; not where
experts are chosen in bf16, because one choice that falls the other way in one token is a difference of several.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from common import DTYPES, arguments, machine, peer, take_turns, write
from common import peers as processes
from generate import LLAMA_SHAPES, MOE_SHAPES, TOLERANCE
from llama import Llama, present
from peers import twin
from trivet.engine.filling import LONGEST_PIECE
from trivet.model import Transformer
from trivet.model.prefill import prefill
from vllm_side import Vllm

SHAPES = ("dense", "dense-0.6b", "moe", "qwen-moe", "minimax")


@torch.inference_mode()
def read(model: Transformer, prompt: Tensor) -> Tensor:
    """The logits [V] behind a prompt [1,T]."""
    caches = model.new_caches(1, prompt.shape[1])
    return model.logits(prefill(model, prompt, caches, LONGEST_PIECE).hidden)[0].float()


def measure(shape: str, dtype: str, length: int, args: argparse.Namespace) -> dict[str, Any]:
    theirs = peer(shape, args.device, max_position_embeddings=length + 1).to(DTYPES[dtype]).eval()
    ours = twin(theirs)
    prompt = torch.randint(1, 8192, (1, length), generator=torch.Generator().manual_seed(0)).to(args.device)
    mask = torch.ones_like(prompt)
    sides: dict[str, Callable[[], int]] = {"trivet": lambda: int(read(ours, prompt).argmax())}
    if "transformers" in args.peers:
        sides["transformers"] = lambda: int(
            theirs.generate(prompt, attention_mask=mask, max_new_tokens=1, do_sample=False)[0, -1]
        )
    if "llama.cpp" in args.peers and shape in LLAMA_SHAPES:
        llama = Llama(theirs, 1, length + 1, args.threads)
        sides["llama.cpp"] = lambda: int(llama.generate(prompt, 1)[0, -1])
    if args.vllm and shape != "minimax":
        vllm = Vllm(args.vllm, theirs, 1, length + 1, args.threads)
        processes.append(vllm.pid)
        sides["vllm"] = lambda: vllm.generate(prompt.tolist(), 1)[0][0]
    logits = read(ours, prompt)
    regrets = {name: float(logits.max() - logits[side()]) for name, side in sides.items()}
    for name, worst in regrets.items():
        checked = dtype == "fp32" or shape not in (*MOE_SHAPES, "minimax")
        if checked and worst > 10 * TOLERANCE[dtype]:  # of one token, not the mean of many
            raise SystemExit(f"{shape} {dtype}: {name} writes another token (regret {worst:.3f}): nothing to compare.")
    times = take_turns(sides, args.rounds, args.device, warm=True)
    if "llama.cpp" in sides:
        llama.close()
    if "vllm" in sides:
        processes.remove(vllm.pid)
        vllm.close()
    cells = [
        f"{name} {t * 1e3:.0f} ms" + (f" ({t / times['trivet']:.2f}x, regret {regrets[name]:.3f})" if i else "")
        for i, (name, t) in enumerate(times.items())
    ]
    print(f"{shape:10} {dtype} {length:6} tokens  " + "  ".join(cells), flush=True)
    return {"shape": shape, "dtype": dtype, "length": length, "seconds": times, "regret": regrets}


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--shape", default="dense", help=f"some of {','.join(SHAPES)}")
    parser.add_argument("--dtypes", default="fp32,bf16")
    parser.add_argument("--lengths", default="1024,4096,8192,16384")
    parser.add_argument("--peers", default="transformers,llama.cpp")
    parser.add_argument("--vllm", help="the Python of an environment with vLLM, which is then a peer, too")
    args = parser.parse_args()
    facts = machine(args)
    args.peers = present(args.peers)
    results = [
        measure(shape, dtype, int(length), args)
        for shape in args.shape.split(",") for dtype in args.dtypes.split(",") for length in args.lengths.split(",")
    ]  # fmt: skip
    write(args.out, {"benchmark": "prefill", "machine": facts, "results": results})


if __name__ == "__main__":
    main()
