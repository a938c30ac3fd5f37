"""Loading needs the weights once, and one shard: measured in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from trivet.hub.checkpoint import save_checkpoint
from trivet.hub.write import write_config
from trivet.model import Transformer, save_model
from trivet.spec import GQA, ModelSpec, MoE, Rope

SHARD = 8 * 10**6
SPEC = ModelSpec(
    vocab_size=1000, d_model=256, pattern="g/m*6", tie_embeddings=False,
    mixers={"g": GQA(heads=4, kv_heads=2, head_dim=64, rope=Rope(dims=64), qk_norm=True)},
    ffns={"m": MoE(experts=16, top_k=2, hidden=256, score="softmax", selection_bias=False)},
)  # fmt: skip
PROGRAM = """
import sys, torch
from pathlib import Path
from safetensors.torch import load_file
from trivet.hub.checkpoint import load_any
def peak():  # of this process so far, in bytes: the kernel's own count
    return next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith("VmHWM"))
folder, how = Path(sys.argv[1]), sys.argv[2]
torch.zeros(8, 8) @ torch.zeros(8, 8)
before = peak()
if how == "careless":  # every shard first, as a state dict
    state = {n: t.clone() for f in folder.glob("*.safetensors") for n, t in load_file(f).items()}
model = load_any(folder)
print(peak() - before, float(model.embed.sum()))
"""


def growth(folder: Path, how: str = "") -> int:
    words = [sys.executable, "-c", PROGRAM, str(folder), how]
    done = subprocess.run(words, capture_output=True, text=True, timeout=100, check=True)
    return int(done.stdout.split()[0])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_loading_takes_the_weights_and_one_shard(tmp_path: Path) -> None:
    model = Transformer(SPEC)
    weights = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    assert weights > 10 * SHARD
    for folder in ("family", "ours"):
        (tmp_path / folder).mkdir()
    save_checkpoint(model, tmp_path / "family", write_config(SPEC), shard_bytes=SHARD)
    save_model(model, tmp_path / "ours")
    largest = max(f.stat().st_size for f in (tmp_path / "family").glob("*.safetensors"))
    allowed = 1.1 * weights + largest
    assert 0.9 * weights < growth(tmp_path / "family") < allowed
    assert growth(tmp_path / "ours") < 1.1 * weights
    assert growth(tmp_path / "family", "careless") > allowed  # the twin
