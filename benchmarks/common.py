"""What the benchmarks share: shapes, the machine's own limits, and interleaved rounds with medians.

A ratio means something only if both sides ran in the same minutes on the same weights, so the sides
take turns within a round and every number is the median over rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from trivet.recipes.memory import keep_freed_memory

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))  # peers.py: the weight mapping

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
peers: list[int] = []  # processes of peers that have one of their own; they work only while they are asked


def cpu_time() -> float:
    """Seconds of processor time, of this process and of the peers' (Linux: a process's clock is made of its id)."""
    return time.process_time() + sum(time.clock_gettime((~pid << 3) | 2) for pid in peers)


CLOCKS = {False: time.perf_counter, True: cpu_time}  # whether --cpu-time is on
now = CLOCKS[False]


def arguments(doc: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--keep-memory", action="store_true", help="keep freed memory, as the command line does")
    parser.add_argument("--cpu-time", action="store_true", help="of the processes, for a busy machine and one thread")
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    return parser


# ------------------------------------------------------------------------------------------- machine
def synchronise(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def seconds(work: Callable[[], Any], device: str) -> float:
    synchronise(device)
    start = now()
    work()
    synchronise(device)
    return now() - start


def best(work: Callable[[], Any], device: str, times: int = 5) -> float:
    work()
    return min(seconds(work, device) for _ in range(times))


def machine(args: argparse.Namespace) -> dict[str, Any]:
    """Who measured, and what it can do at most: read bandwidth and matmul peak, both measured here."""
    global now
    torch.set_num_threads(args.threads)
    now = CLOCKS[args.cpu_time]
    if args.keep_memory:
        keep_freed_memory()
    device = args.device
    big = torch.ones(2**26, device=device)  # 256 MiB: larger than any cache
    facts: dict[str, Any] = {
        "machine": torch.cuda.get_device_name() if torch.device(device).type == "cuda" else _cpu(),
        "device": device,
        "threads": args.threads,
        "clock": now.__name__,
        "torch": torch.__version__,
        "keeps_memory": args.keep_memory,
        "load": os.getloadavg()[0],
        "bytes_per_s": big.nbytes / best(big.sum, device),
    }
    del big
    size = 1024 if torch.device(device).type == "cpu" else 8192
    for name, dtype in DTYPES.items():
        a = torch.randn(size, size, device=device).to(dtype)
        facts[f"flops_{name}"] = 2 * size**3 / best(lambda a=a: a @ a, device)
    print(
        f"{facts['machine']}, {device}, {args.threads} threads, torch {facts['torch']}, load {facts['load']:.1f}; "
        f"reads {facts['bytes_per_s'] / 1e9:.1f} GB/s, matmul fp32 {facts['flops_fp32'] / 1e9:.0f} "
        f"bf16 {facts['flops_bf16'] / 1e9:.0f} GFLOP/s"
    )
    return facts


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def take_turns(sides: dict[str, Callable[[], Any]], rounds: int, device: str, warm: bool = False) -> dict[str, float]:
    """Median seconds of each side over `rounds`, the sides running one after the other in each.

    warm: whether they have run already, which pays for the allocator, lazily built state and other first calls.
    """
    for work in () if warm else sides.values():
        work()
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, work in sides.items():
            times[name].append(seconds(work, device))
    return {name: statistics.median(t) for name, t in times.items()}


def write(path: Path | None, results: dict[str, Any]) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=2) + "\n")
        print(f"written to {path}")


# -------------------------------------------------------------------------------------------- shapes
def peer(shape: str, device: str, **changes: Any) -> Any:
    """A transformers model with random weights: "dense" (Qwen3, 5.8M), "dense-0.6b" (Qwen3-0.6B with 32k tokens, 473M),
    "moe" (DeepSeek-V3, 108M), "qwen-moe" (Qwen3-MoE, 111M) or "minimax" (MiniMax, 50M, three of four layers lightning)."""
    import transformers

    from peers import randomise

    common = {
        "vocab_size": 8192, "max_position_embeddings": 4096, "bos_token_id": None, "eos_token_id": None,
        "pad_token_id": None, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }  # fmt: skip
    model: Any
    if shape == "dense":
        config = common | {
            "hidden_size": 256, "num_hidden_layers": 6, "intermediate_size": 544, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 64, "tie_word_embeddings": True,
        }  # fmt: skip
        model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**(config | changes)))
    elif shape == "dense-0.6b":
        config = common | {
            "vocab_size": 32768, "hidden_size": 1024, "num_hidden_layers": 28, "intermediate_size": 3072,
            "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True,
        }  # fmt: skip
        model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**(config | changes)))
    elif shape == "qwen-moe":
        config = common | {
            "hidden_size": 512, "num_hidden_layers": 8, "intermediate_size": 1536, "num_attention_heads": 8,
            "num_key_value_heads": 2, "head_dim": 64, "num_experts": 32, "num_experts_per_tok": 4,
            "moe_intermediate_size": 256, "norm_topk_prob": True, "tie_word_embeddings": False,
        }  # fmt: skip
        model = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**(config | changes)))
    elif shape == "minimax":
        config = common | {
            "hidden_size": 512, "num_hidden_layers": 8, "intermediate_size": 256, "num_attention_heads": 8,
            "num_key_value_heads": 2, "head_dim": 64, "num_local_experts": 16, "num_experts_per_tok": 2,
            "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 2, "tie_word_embeddings": True,
        }  # fmt: skip
        model = transformers.MiniMaxForCausalLM(transformers.MiniMaxConfig(**(config | changes)))
    else:
        config = common | {
            "hidden_size": 512, "num_hidden_layers": 8, "intermediate_size": 1536, "first_k_dense_replace": 1,
            "num_attention_heads": 8, "num_key_value_heads": 8, "q_lora_rank": 256, "kv_lora_rank": 128,
            "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64, "n_routed_experts": 32,
            "num_experts_per_tok": 4, "n_shared_experts": 1, "moe_intermediate_size": 256, "n_group": 1,
            "topk_group": 1, "num_nextn_predict_layers": 0,
        }  # fmt: skip
        model = transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**(config | changes)))
    randomise(model)
    return model.to(device)
