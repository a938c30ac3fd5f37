"""Several processes train as one: fp32 weights within 1e-5 of one process after four steps, whatever is divided how.

All runs are made at once, by processes that `parallel_runs.py` forks; the tests then compare what they left.
"""

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

from job_runs import logged, run_jobs
from parallel_runs import CASES, model_of
from trivet.disk import Journal
from trivet.hub.checkpoint import load_pair
from trivet.measure.activations import Setting
from trivet.measure.memory import training_memory
from trivet.train.data import Batch, Document, lay_out, share
from trivet.train.trainer import TIMES

Job = tuple[str, str, int, dict[str, Any], dict[str, Any]]
RECOMPUTE = {"recompute": True}
MIXED: dict[str, Any] = {"shards": 2, "expert_shards": 2}
EQUAL: list[Job] = [  # each against the one process of its case
    ("dense-2", "dense", 2, {}, {}),
    ("dense-4", "dense", 4, {"shards": 2}, {}),  # two replicas
    ("dense-copies", "dense", 2, {"shards": 1}, {}),
    ("moe-2", "moe", 2, {}, {}),
    ("moe-2x2", "moe", 4, MIXED, {}),
    ("moe-recompute", "moe", 4, MIXED | RECOMPUTE, {}),
    ("moe-offload", "moe", 4, MIXED | {"offload": "gradients"}, {}),
    ("moe-offload-late", "moe", 2, {"offload": "optimizer"}, {}),
    ("moe-replicas", "moe", 4, {"shards": 1, "expert_shards": 2}, {}),
    ("hybrid-4", "hybrid", 4, {}, {}),
    ("delta-2", "delta", 2, {"expert_shards": 2}, {}),
    ("lora-4", "lora", 4, MIXED, {}),
]
JOBS: list[Job] = [
    *((case, case, 1, {}, {}) for case in CASES),
    *EQUAL,
    ("rows", "dense", 1, {"accumulate": 1}, {}),
    ("rows-4", "dense", 4, {"accumulate": 1}, {}),  # one row each
    ("three", "dense", 1, {"rows": 3}, {}),
    ("three-3", "dense", 3, {"rows": 3}, {}),  # uneven parts, some of them empty
    ("means", "dense", 2, {}, {"breaks": "means"}),
    ("bf16", "moe", 4, MIXED | {"precision": "bf16"}, {}),
    # 4 processes are stopped, and go on as 4, as 2 and as 1; 1 is stopped and goes on as 4
    ("stopped", "moe", 4, MIXED, {"stop_at": 25}),
    ("again-4", "moe", 4, MIXED, {"goes_on": "stopped"}),
    ("again-2", "moe", 2, {}, {"goes_on": "stopped"}),
    ("again-1", "moe", 1, {}, {"goes_on": "stopped"}),
    ("stopped-1", "moe", 1, {}, {"stop_at": 25}),
    ("again-1-4", "moe", 4, MIXED, {"goes_on": "stopped-1"}),
    ("lora-stopped", "lora", 2, {}, {"stop_at": 25}),
    ("lora-again", "lora", 4, MIXED, {"goes_on": "lora-stopped"}),
    ("full-disk", "dense", 2, {}, {"breaks": "disk"}),
    ("bad-shards", "dense", 2, {"shards": 4}, {}),
    ("bad-alone", "dense", 1, {"shards": 2}, {}),
    ("bad-rows", "dense", 2, {"rows": 3, "accumulate": 1}, {}),
    ("bad-experts", "moe", 3, {"expert_shards": 3, "rows": 3}, {}),
    ("bad-dense", "dense", 2, {"expert_shards": 2}, {}),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_jobs("parallel_runs.py", JOBS, tmp_path_factory.mktemp("runs"))


def lines(folder: Path) -> list[dict[str, Any]]:
    return logged(folder, TIMES)


def check_equal(mine: Path, want: Path, tolerance: float) -> None:
    a, b = load_file(mine / "whole.safetensors"), load_file(want / "whole.safetensors")
    assert a.keys() == b.keys()
    for name, tensor in b.items():
        torch.testing.assert_close(a[name], tensor, rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")
    assert len(lines(mine)) == len(lines(want)) == 4
    for line, other in zip(lines(mine), lines(want), strict=True):
        assert line == pytest.approx(other, rel=2e-4 if tolerance else 0, abs=tolerance)


@pytest.mark.parametrize("name", [job[0] for job in EQUAL] + ["rows-4", "three-3"])
def test_several_processes_end_where_one_does(runs: Path, name: str) -> None:
    check_equal(runs / name, runs / name.partition("-")[0], 1e-5)


def test_a_mean_of_means_is_noticed(runs: Path) -> None:
    with pytest.raises(AssertionError):
        check_equal(runs / "means", runs / "dense", 1e-3)


def test_the_four_steps_move_every_weight_that_is_compared(runs: Path) -> None:
    for case in CASES:
        trained, before = load_file(runs / case / "whole.safetensors"), model_of(case)
        for name, p in before.named_parameters():
            assert not p.requires_grad or not torch.equal(trained[name], p), name


def test_bf16_stays_near(runs: Path) -> None:
    """Products of other shapes round otherwise; routers and losses are fp32 as on one process."""
    for line, other in zip(lines(runs / "bf16"), lines(runs / "moe"), strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=0.02)
    assert lines(runs / "bf16") != lines(runs / "moe-2x2")


@pytest.mark.parametrize(("name", "settings"), [("moe-2", (2, 1)), ("moe-2x2", (2, 2)), ("moe-replicas", (1, 2))])
def test_a_process_holds_what_the_plan_says(runs: Path, name: str, settings: tuple[int, int]) -> None:
    shards, expert_shards = settings
    ask = Setting(precision="fp32", shards=shards, expert_shards=expert_shards, cpu=True)
    planned = training_memory(model_of("moe").spec, ask).weights / 4
    held = [int(p.read_text()) for p in sorted((runs / name).glob("held-*"))]
    assert len(held) == int(name == "moe-2") * 2 or len(held) == 4
    assert sum(held) / len(held) == pytest.approx(planned, rel=0.01)
    assert max(held) < 1.02 * min(held)  # what no dimension divides evenly is uneven


def test_offloaded_gradients_leave_a_divided_model_too(runs: Path) -> None:
    assert [json.loads((runs / "moe-offload" / f"left-{rank}").read_text()) for rank in range(4)] == [[0] * 4] * 4
    assert min(json.loads((runs / "moe-offload-late" / "left-0").read_text())) > 10  # the twin: those that wait


# --------------------------------------------------------------------------------------- stop and go on
def test_one_interrupted_process_stops_all_at_the_same_step(runs: Path) -> None:
    said = {(runs / "stopped" / f"ended-{rank}").read_text() for rank in range(4)}
    assert len(said) == 1
    assert "is saved" in said.pop()
    (saved,) = (runs / "stopped" / "resume").iterdir()
    assert saved.name in ("step-00000001", "step-00000002", "step-00000003")
    assert len(list(saved.glob("model-*-of-00004.safetensors"))) == 4


def test_as_many_processes_go_on_to_the_same_bits(runs: Path) -> None:
    check_equal(runs / "again-4", runs / "moe-2x2", 0)


@pytest.mark.parametrize(
    ("name", "want"), [("again-2", "moe"), ("again-1", "moe"), ("again-1-4", "moe"), ("lora-again", "lora")]
)
def test_other_numbers_of_processes_go_on_too(runs: Path, name: str, want: str) -> None:
    check_equal(runs / name, runs / want, 1e-5)


def test_what_one_process_cannot_write_no_process_saves(runs: Path) -> None:
    said = [(runs / "full-disk" / f"ended-{rank}").read_text() for rank in range(2)]
    assert "Another process could not write" in said[0]
    assert "No space left on device" in said[1] and "resumes" in said[1]
    assert list((runs / "full-disk" / "resume").iterdir()) == []


# ------------------------------------------------------------------------------------ what can't be
@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("bad-shards", "need a multiple of 4 processes; 2 processes were started"),
        ("bad-alone", r"need a multiple of 2 processes; one process was started \(torchrun starts more\)"),
        ("bad-rows", "train.rows = 3 and train.accumulate = 1 can't be divided evenly over 2 processes"),
        ("bad-experts", "train.expert_shards = 3 does not divide 8 experts; take one of 2, 4, 8"),
        ("bad-dense", "this model has none: leave it out"),
    ],
)
def test_what_cannot_be_divided_is_said(runs: Path, name: str, sentence: str) -> None:
    for ended in (runs / name).glob("ended-*"):
        with pytest.raises(ValueError, match=sentence):
            raise ValueError(ended.read_text())
    assert list((runs / name).glob("ended-*"))


# ----------------------------------------------------------------------------------------------- parts
def batch(rows: int, start: int) -> Batch:
    documents = [[Document([start + r] * n, [False] + [True] * (n - 1)) for n in (3 + r, 4)] for r in range(rows)]
    return lay_out(documents, 16, state=start)


@pytest.mark.parametrize(("batches", "rows", "world"), [(4, 2, 2), (2, 4, 4), (1, 4, 4), (6, 2, 4), (3, 1, 3)])
def test_shares_add_up_to_the_step(batches: int, rows: int, world: int) -> None:
    step = [batch(rows, 100 * i) for i in range(batches)]
    shares = [share(step, rank, world) for rank in range(world)]
    assert len({(len(s), len(s[0].tokens)) for s in shares}) == 1
    want = sorted(tuple(row) for b in step for row in b.tokens.tolist())
    assert sorted(tuple(row) for s in shares for b in s for row in b.tokens.tolist()) == want
    for name in ("count", "filled", "context"):
        assert sum(getattr(b, name) for s in shares for b in s) == sum(getattr(b, name) for b in step)


def test_torchrun_trains_a_model_that_loads(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("""
        model = { d_model = 16, context_length = 64, pattern = "gqa/dense", mixers = { gqa = { kind = "gqa", heads = 2, kv_heads = 1, head_dim = 8, rope = { dims = 8 } } }, ffns = { dense = { kind = "swiglu", hidden = 16 } } }
        tasks = [{ name = "chain" }]
        train = { steps = 2, rows = 2, length = 64, overflow = "cut", tensorboard = false }
    """)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "trivet", "train", "mine.toml", "--out", "run", "--device", "cpu", "train.shards=2"]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("2/2") == 1  # one process speaks
    assert [line["step"] for line in Journal(tmp_path / "run" / "metrics.jsonl").read()] == [1, 2]
    model, _ = load_pair(tmp_path / "run")
    assert json.loads((tmp_path / "run" / "done.json").read_text())["step"] == 2
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())
