"""Several processes do RL as one does: the same episodes, fp32 weights within 1e-5 after three steps.

All runs are made at once, by processes that `rl_runs.py` forks; the tests then compare what they left.
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
from rl_runs import CASES, model_of
from trivet.disk import Journal
from trivet.hub.checkpoint import load_pair
from trivet.rl.learner import TIMES

Job = tuple[str, str, int, dict[str, Any], dict[str, Any]]
STOPPED = {"save_every_seconds": 0}
EQUAL: list[Job] = [
    *((f"{case}-2", case, 2, {}, {}) for case in CASES),
    ("moe-offload", "moe", 2, {"offload": "gradients"}, {}),
    ("dense-sharded", "dense", 2, {"shards": 2}, {}),
    ("moe-sharded", "moe", 4, {"shards": 2, "offload": "gradients", "recompute": True}, {}),  # two replicas
    ("lora-sharded", "lora", 4, {"shards": 0}, {}),
    *((f"{case}-4", case, 4, {}, {}) for case in ("moe", "lora")),  # lora: two groups, so two play nothing
]
JOBS: list[Job] = [
    *((case, case, 1, {}, {}) for case in CASES),
    *EQUAL,
    ("mean", "dense", 2, {}, {"breaks": "mean"}),
    # 2 processes are stopped, and go on as 2, as 4 and as 1; 1 is stopped and goes on as 2
    ("stopped", "moe", 2, STOPPED, {"stop_at": 4}),
    ("again-2", "moe", 2, {}, {"goes_on": "stopped"}),
    ("again-4", "moe", 4, {}, {"goes_on": "stopped"}),
    ("again-1", "moe", 1, {}, {"goes_on": "stopped"}),
    ("stopped-1", "lora", 1, STOPPED, {"stop_at": 2}),
    ("again-1-2", "lora", 2, {}, {"goes_on": "stopped-1"}),
    ("stopped-sharded", "moe", 4, STOPPED | {"shards": 4}, {"stop_at": 4}),
    ("sharded-again", "moe", 2, {}, {"goes_on": "stopped-sharded"}),
    ("bad-shards", "dense", 2, {"shards": 4}, {}),
    ("bad-reference", "lora", 2, {"shards": 2, "objective": "grpo"}, {}),
    ("killed", "dense", 2, STOPPED, {"breaks": "killed", "stop_at": 4}),
    ("killed-again", "dense", 2, {}, {"goes_on": "killed"}),
    ("player", "dense", 2, {}, {"breaks": "player"}),
    ("lag", "dense", 2, {"lag": 1}, {}),
    ("partial", "dense", 2, {"partial": 0.5}, {}),
    ("workers", "dense", 2, {"workers": 2}, {}),
    ("server", "dense", 2, {"server": {"url": "http://127.0.0.1:1", "like": ".", "folder": "."}}, {}),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_jobs("rl_runs.py", JOBS, tmp_path_factory.mktemp("runs"))


def lines(folder: Path) -> list[dict[str, Any]]:
    return logged(folder, TIMES)


def episodes(folder: Path, steps: int) -> list[Any]:
    """Who was asked what, what was written and what it was worth, in order."""
    return [
        [line[name] for name in ("step", "problem", "group", "ids", "kinds", "score")]
        for line in Journal(folder / "rollouts.jsonl").read()
        if line["step"] <= steps
    ]


def check_equal(mine: Path, want: Path, tolerance: float, whole: str = "whole-0") -> None:
    a, b = load_file(mine / f"{whole}.safetensors"), load_file(want / "whole-0.safetensors")
    assert a.keys() == b.keys()
    for name, tensor in b.items():
        torch.testing.assert_close(a[name], tensor, rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")
    assert episodes(mine, 3) == episodes(want, 3) and len(episodes(want, 3)) >= 3 * 8
    assert len(lines(mine)) == len(lines(want)) == 3
    for line, other in zip(lines(mine), lines(want), strict=True):
        assert line == pytest.approx(other, rel=1e-3 if tolerance else 0, abs=tolerance)


@pytest.mark.parametrize("name", [job[0] for job in EQUAL if job[1] != "bf16"])
def test_several_processes_end_where_one_does(runs: Path, name: str) -> None:
    check_equal(runs / name, runs / name.partition("-")[0], 1e-5)


def test_all_processes_end_with_the_same_bits(runs: Path) -> None:
    for rank in range(1, 4):
        check_equal(runs / "moe-4", runs / "moe-4", 0, f"whole-{rank}")


def test_a_divided_policy_is_held_in_parts(runs: Path) -> None:
    for name, of in (("dense", 1), ("dense-2", 1), ("dense-sharded", 2), ("moe-sharded", 2), ("lora-sharded", 4)):
        whole = sum(p.numel() for p in model_of(name.partition("-")[0]).parameters())
        assert int((runs / name / "held-0").read_text()) == pytest.approx(whole / of, rel=0.05), name


def test_a_mean_of_gradients_is_noticed(runs: Path) -> None:
    assert episodes(runs / "mean", 1) == episodes(runs / "dense", 1)
    with pytest.raises(AssertionError):
        check_equal(runs / "mean", runs / "dense", 1e-3)


def test_bf16_stays_near(runs: Path) -> None:
    """Products of other shapes round otherwise, and then another token may be drawn."""
    first, other = lines(runs / "bf16-2")[0], lines(runs / "bf16")[0]
    assert first["entropy"] == pytest.approx(other["entropy"], rel=0.02)
    assert first["ratio/max_abs_log"] == 0.0


def test_the_runs_show_something(runs: Path) -> None:
    for case in CASES:
        trained = load_file(runs / case / "whole-0.safetensors")
        moved = [n for n, p in model_of(case).named_parameters() if p.requires_grad and not torch.equal(trained[n], p)]
        assert len(moved) > 5, case
    assert all(line["calls_tool"] > 0 for line in lines(runs / "tools"))
    assert all(-1 <= line["reward/length"] < 0 for line in lines(runs / "tools"))
    assert any(line["rounds"] > 1 for line in lines(runs / "lora"))
    assert all(line["kl"] > 0 and line["routing/agreement"] > 0.9 for line in lines(runs / "moe"))


# --------------------------------------------------------------------------------------- stop and go on
def test_one_interrupted_process_stops_all_at_the_same_step(runs: Path) -> None:
    said = {(runs / "stopped" / f"ended-{rank}").read_text() for rank in range(2)}
    assert len(said) == 1 and "is saved" in said.pop()
    saved = sorted((runs / "stopped" / "resume").iterdir())[-1]
    assert saved.name in ("step-00000001", "step-00000002")
    assert sorted(p.name for p in saved.iterdir()) == ["model.safetensors", "optimizer.safetensors", "state.json"]


def test_as_many_processes_go_on_to_the_same_bits(runs: Path) -> None:
    check_equal(runs / "again-2", runs / "moe-2", 0)
    check_equal(runs / "killed-again", runs / "dense-2", 0)


@pytest.mark.parametrize(
    ("name", "want"), [("again-4", "moe"), ("again-1", "moe"), ("again-1-2", "lora"), ("sharded-again", "moe")]
)
def test_other_numbers_of_processes_go_on_too(runs: Path, name: str, want: str) -> None:
    check_equal(runs / name, runs / want, 1e-5)


def test_a_killed_process_leaves_nobody_waiting(runs: Path) -> None:
    """The job ended in time, or there were no runs; nothing that it had not finished was saved."""
    (said,) = (runs / "killed").glob("ended-*")
    assert said.name == "ended-0" and "another of the 2 processes was lost" in said.read_text()
    assert 1 <= len(lines(runs / "killed")) < 3


def test_what_stops_one_player_stops_all_with_its_sentence(runs: Path) -> None:
    assert {(runs / "player" / f"ended-{rank}").read_text() for rank in range(2)} == {"this process has no room"}


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("bad-shards", "rl.shards = 4 needs a multiple of 4 processes; 2 processes were started"),
        ("bad-reference", "the reference of grpo's KL term"),
        *((name, f"rl.{name} is another way") for name in ("lag", "partial", "workers", "server")),
    ],
)
def test_what_cannot_be_shared_out_is_said(runs: Path, name: str, sentence: str) -> None:
    """By who comes to it first; the other may only see that one leave."""
    assert any(sentence in ended.read_text() for ended in (runs / name).glob("ended-*"))
    assert not list((runs / name).glob("whole-*"))


RECIPE = """
name = "small"

[stages.start]
kind = "train"
model = { d_model = 16, context_length = 64, pattern = "gqa/dense", mixers = { gqa = { kind = "gqa", heads = 2, kv_heads = 1, head_dim = 8, rope = { dims = 8 } } }, ffns = { dense = { kind = "swiglu", hidden = 16 } } }
tasks = [{ name = "arithmetic" }]
train = { steps = 2, rows = 2, length = 64, overflow = "cut", tensorboard = false }

[stages.learn]
kind = "rl"
start = "start"
tasks = [{ name = "arithmetic" }]
rl = { steps = 2, problems = 3, group = 2, max_tokens = 8, length = 64, tensorboard = false }

[stages.look]
kind = "compare"
models = ["start", "learn"]
probes = [{ label = "sums", task = { name = "arithmetic" }, max_tokens = 8 }]
count = 4
"""


def torchrun(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "trivet"]
    return subprocess.run(
        [*command, *words, "--device", "cpu"], cwd=folder, capture_output=True, text=True, timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    (folder / "small.toml").write_text(RECIPE)
    done = torchrun(folder, "run", "small.toml", "--out", "out")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("2/2") == 3  # a stage each; one process speaks
    return folder


def test_torchrun_runs_a_recipe(recipe: Path) -> None:
    """Its stages of training on both processes, the others on the first."""
    out = recipe / "out"
    for name in ("start", "learn"):
        assert [line["step"] for line in Journal(out / name / "metrics.jsonl").read()] == [1, 2]
        load_pair(out / name)
    assert list((out / "start" / "resume").glob("*/model-00002-of-00002.safetensors"))  # both took part
    assert json.loads((out / "look" / "done.json").read_text()) == {"points": 2}


def test_what_stops_the_first_process_stops_both(recipe: Path) -> None:
    again = torchrun(recipe, "run", "small.toml", "stages.look.count=5", "--out", "out")
    assert again.returncode != 0 and again.stderr.count("was run with count = 4, now it is 5") == 1
    assert again.stderr.count("complete, skipped") == 2
    assert "rank      : 0 " in again.stderr.partition("Root Cause")[2]  # and the other was not what ended it


def test_torchrun_makes_a_model_that_loads(recipe: Path) -> None:
    (recipe / "mine.toml").write_text("""
        start = "out/start"
        tasks = [{ name = "arithmetic" }]
        rl = { steps = 2, problems = 3, group = 2, max_tokens = 8, length = 64, tensorboard = false }
    """)
    done = torchrun(recipe, "rl", "mine.toml", "--out", "alone")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("2/2") == 1
    assert json.loads((recipe / "alone" / "done.json").read_text())["step"] == 2
    mine, theirs = (load_pair(recipe / name)[0].state_dict() for name in ("alone", "out/learn"))
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)  # the same, in a recipe or alone
