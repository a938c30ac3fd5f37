"""A run that is killed again and again ends with the bits of one that was left in peace.

One process imports torch and forks a child for each attempt (an import costs seconds). The children
are really killed, at moments that no one chose: in the middle of a step, of a save, of a log line.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from trivet.disk import Journal
from trivet.train.trainer import TIMES

STEPS = 60

RUNNER = """
import json, os, random, signal, sys, time
from pathlib import Path
import torch
from trivet.model import Transformer
from trivet.spec import GQA, GatedDeltaNet, Lightning, MoE, ModelSpec, Rope
from trivet.train.data import Document, Mixture, TextDocuments, stable_hash
from trivet.train.loop import Interrupted
from trivet.train.trainer import TrainConfig, train

torch.set_num_threads(1)
steps, signals = int(sys.argv[2]), json.loads(sys.argv[3])

class Counting:
    def __getitem__(self, index):
        rng = random.Random(stable_hash(3, index))
        n, start = rng.randint(3, 14), rng.randrange(23)
        return Document([(start + i) % 23 for i in range(n)], [False] + [True] * (n - 1))

SPEC = ModelSpec(
    vocab_size=23, d_model=16, pattern="lightning/moe delta/moe gqa/moe", mtp=1,
    mixers={"lightning": Lightning(heads=2, head_dim=8),
            "delta": GatedDeltaNet(heads=2, key_heads=1, key_dim=8, value_dim=8),
            "gqa": GQA(heads=2, kv_heads=1, head_dim=8, rope=Rope(dims=8))},
    ffns={"moe": MoE(experts=4, top_k=2, hidden=8, shared_hidden=8, balance=0.01)},
)
CONFIG = TrainConfig(steps=steps, rows=4, length=24, accumulate=2, log_every=2, eval_every=7,
                     warmup=5, tensorboard=False, save_every_seconds=0.02)
text = torch.randint(23, (500,), generator=torch.Generator().manual_seed(0))
data = Mixture([Counting(), TextDocuments(text, 10)], [2, 1])

def child(out):
    try:
        train(Transformer(SPEC, seed=1), data, CONFIG, out,
              evaluate=lambda m: {"norm": m.embed.norm().item()})
    except Interrupted as e:
        print("INTERRUPTED", e, flush=True)
        os._exit(3)
    except KeyboardInterrupt:
        os._exit(4)  # before the loop, where nothing is lost
    except BaseException as e:
        print("FAILED", repr(e), file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)

def fork(out):
    pid = os.fork()
    if pid == 0:
        child(out)
    return pid

def ended(pid, timeout=60):
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        got, status = os.waitpid(pid, os.WNOHANG)
        if got:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.001)
    os.kill(pid, signal.SIGKILL)
    raise SystemExit("a child hung")

folder = Path(sys.argv[1])
began = time.monotonic()
codes = [ended(fork(folder / "straight"))]
whole = time.monotonic() - began
for number, share in signals:
    pid = fork(folder / "killed")
    if share is None:  # as soon as there is a state
        while not list(folder.glob("killed/resume/step-*")):
            time.sleep(0.001)
    else:
        time.sleep(share * whole)
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass
    codes.append(ended(pid))
codes.append(ended(fork(folder / "killed")))
print(json.dumps(codes))
"""


def run(folder: Path, signals: list[tuple[int, float | None]], program: str = RUNNER) -> tuple[list[int], str]:
    """Exit codes of the straight run, of each attempt, and of the last; and what was printed."""
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder), str(STEPS), json.dumps(signals)],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stdout + done.stderr


def end_state(folder: Path) -> dict[str, torch.Tensor]:
    last = max((folder / "resume").iterdir())
    assert last.name == f"step-{STEPS:08d}"
    tensors = load_file(last / "optimizer.safetensors")
    return tensors | {f"model.{name}": t for name, t in load_file(last / "model.safetensors").items()}


def lines(folder: Path) -> list[dict[str, Any]]:
    journal = Journal(folder / "metrics.jsonl").read()
    return [{k: v for k, v in line.items() if k not in TIMES} for line in journal]


def check_equal(folder: Path) -> None:
    straight, killed = end_state(folder / "straight"), end_state(folder / "killed")
    assert straight.keys() == killed.keys() and len(straight) > 40
    for name, tensor in straight.items():
        assert torch.equal(tensor, killed[name]), name
    assert lines(folder / "straight") == lines(folder / "killed")
    assert [line["step"] for line in lines(folder / "straight")][-1] == STEPS


@pytest.mark.parametrize(("number", "times", "stopped"), [(signal.SIGKILL, 7, {-9}), (signal.SIGINT, 3, {3, 4})])
def test_killed_runs_end_with_the_same_bits(tmp_path: Path, number: int, times: int, stopped: set[int]) -> None:
    rng = random.Random()  # other moments every time, on purpose
    signals = [(int(number), rng.uniform(0.02, 0.6)) for _ in range(times)]
    codes, printed = run(tmp_path, [*signals, (int(number), None)])
    assert codes[0] == codes[-1] == 0, printed
    assert stopped & set(codes[1:-1]), f"no attempt was hit: {codes}, {signals}"
    assert set(codes[1:-1]) <= stopped | {0}, printed
    check_equal(tmp_path)


def test_a_lost_optimizer_state_is_noticed(tmp_path: Path) -> None:
    """The twin: resume without the momenta, and the same comparison fails."""
    forgetful = RUNNER.replace(
        "def child(out):",
        "from trivet.train.optim import Optimizer\n"
        "def forget(self, state): self.steps = int(state['steps'])\n"
        "Optimizer.load_state_dict = forget\n"
        "def child(out):",
    )
    codes, _ = run(tmp_path, [(int(signal.SIGKILL), None)], forgetful)
    assert codes == [0, -9, 0]
    with pytest.raises(AssertionError):
        check_equal(tmp_path)
