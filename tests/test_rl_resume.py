"""A run of RL that is killed and started again ends with the bits of one that was left in peace."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from trivet.disk import Journal
from trivet.rl.learner import TIMES

STEPS = 10
HERE = str(Path(__file__).parent)

RUNNER = """
import json, os, random, signal, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import torch
from test_rl_learner import CHAT, Calls, Digits, config, make
from test_rl_sampler import HalfSolved
from trivet.rl.learner import learn

torch.set_num_threads(1)
folder = Path(sys.argv[1])
CONFIG = config(
    steps=int(sys.argv[3]), objective="grpo", epochs=2, save_every_seconds=0, **json.loads(sys.argv[4])
)

def child(out):
    try:
        learn(make("lightning/moe mla/moe gqa/dense", noise=0.3), CHAT, [(HalfSolved(), 1.0), (Calls(), 1.0)], CONFIG, out)
    except BaseException as e:
        print("FAILED", repr(e), file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)

def fork(out):
    pid = os.fork()
    if pid == 0:
        child(out)
    return pid

def ended(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

began = time.monotonic()
codes = [ended(fork(folder / "straight"))]
whole = time.monotonic() - began
rng = random.Random()  # other moments every time, on purpose
pid = fork(folder / "killed")
while codes == [0] and not list(folder.glob("killed/resume/step-*")):
    time.sleep(0.001)
    if os.waitpid(pid, os.WNOHANG)[0]:
        raise SystemExit("the run ended without saving a state")
kills = 2 if "lag" in sys.argv[4] else 4  # every start takes a process of its own some seconds
for i in range(kills):
    os.kill(pid, signal.SIGKILL)
    codes.append(ended(pid))
    pid = fork(folder / "killed")
    if i < kills - 1:
        time.sleep(rng.uniform(0.1, 0.5) * whole)
codes.append(ended(pid))
print(json.dumps(codes))
"""


def run(folder: Path, program: str = RUNNER, **settings: Any) -> list[int]:
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder), HERE, str(STEPS), json.dumps(settings)],
        check=False, capture_output=True, text=True, timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    codes = json.loads(done.stdout.splitlines()[-1])
    assert codes[0] == codes[-1] == 0 and codes[1] == -9, done.stderr
    assert set(codes) <= {0, -9}, done.stderr
    return codes


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
    assert straight.keys() == killed.keys() and len(straight) > 30
    for name, tensor in straight.items():
        assert torch.equal(tensor, killed[name]), name
    assert lines(folder / "straight") == lines(folder / "killed")
    assert [line["step"] for line in lines(folder / "straight")] == list(range(1, STEPS + 1))
    assert all("kl" in line for line in lines(folder / "straight"))  # the reference was the same model, too


@pytest.mark.parametrize(
    "settings", [{}, {"dynamic": 4, "page_every": 3}, {"partial": 0.5, "max_rows": 6}, {"lag": 1}], ids=str
)
def test_killed_runs_end_with_the_same_bits(tmp_path: Path, settings: dict[str, Any]) -> None:
    run(tmp_path, **settings)
    check_equal(tmp_path)
    logged = lines(tmp_path / "straight")
    if "dynamic" in settings:
        assert any(line["rounds"] > 1 for line in logged)
    if "partial" in settings or "lag" in settings:
        assert any("stale/share" in line for line in logged)
    if "page_every" in settings:
        pages = [Journal(tmp_path / name / "rollouts.jsonl").read() for name in ("straight", "killed")]
        assert pages[0] == pages[1] and {line["step"] for line in pages[0]} == {3, 6, 9}


def test_a_forgotten_step_is_noticed(tmp_path: Path) -> None:
    """The twin: seeds that do not depend on the step of the run, but on that of the process."""
    forgetful = RUNNER.replace(
        "def child(out):",
        "from trivet.rl import sampler\n"
        "calls = []\n"
        "old = sampler.draw_problems\n"
        "def draw(tasks, seed, step, count, first):\n"
        "    calls.append(step)\n"
        "    return old(tasks, seed, len(calls), count, first)\n"
        "sampler.draw_problems = draw\n"
        "def child(out):",
    )
    run(tmp_path, forgetful)
    with pytest.raises(AssertionError):
        check_equal(tmp_path)
