"""A whole recipe through the real command: run, killed, out of disk, run again, changed."""

from __future__ import annotations

import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from trivet.config import UserError, validate
from trivet.recipes.kinds.rl import RLStage
from trivet.recipes.kinds.train import TrainStage
from trivet.recipes.stages import Recipe, waves
from trivet.train.trainer import TrainConfig

RECIPE = """
name = "small"
threads = 2

[stages.sft]
kind = "train"
threads = 1
[stages.sft.model]
d_model = 16
context_length = 64
pattern = "mla/moe lightning/moe"
tie_embeddings = false
mixers = { mla = { kind = "mla", heads = 2, kv_rank = 8, nope_dim = 4, v_dim = 8, rope = { dims = 4 } }, lightning = { kind = "lightning", heads = 2, head_dim = 8 } }
ffns = { moe = { kind = "moe", experts = 4, top_k = 2, hidden = 8, shared_hidden = 8 } }
[[stages.sft.tasks]]
name = "chain"
max_steps = 4
[[stages.sft.tasks]]
name = "arithmetic"
[stages.sft.train]
steps = 30
rows = 2
length = 64
overflow = "cut"
save_every_seconds = 0

[stages.dense]  # beside rl: both wait for sft only, and take half of the threads
kind = "train"
start = "sft"
threads = 1
tasks = [{ name = "search", weight = 1 }, { name = "chain", weight = 1, max_steps = 4 }]
train = { steps = 3, rows = 2, length = 64, overflow = "cut" }

[stages.rl]
kind = "rl"
start = "sft"
threads = 1
[[stages.rl.tasks]]
name = "arithmetic"
[stages.rl.rl]
steps = 4
problems = 4
group = 4
max_tokens = 16
length = 64
rows = 2
save_every_seconds = 0

[stages.evaluate]
kind = "report"
cold = "sft"
final = "rl"
dense = "dense"
count = 12
short_chains = [2, 4]
longer_chains = [5, 6]
"""
ENV = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "120"}


def command(folder: Path, out: str, *words: str) -> list[str]:
    (folder / "small.toml").write_text(RECIPE)
    program = "from trivet.cli import main; main()"
    return [sys.executable, "-c", program, "run", str(folder / "small.toml"), "--out", str(folder / out), *words]


def run(folder: Path, out: str, *words: str, **more: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(folder, out, *words), capture_output=True, text=True, env=ENV, timeout=110, **more)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("straight")
    done = run(folder, "out")
    assert done.returncode == 0, done.stderr
    (folder / "stdout").write_text(done.stdout)
    (folder / "stderr").write_text(done.stderr)
    return folder


def end_state(run_dir: Path) -> dict[str, Any]:
    """Everything that must not depend on what happened on the way."""
    state: dict[str, Any] = {}
    for stage in ("sft", "dense", "rl"):
        for name, tensor in load_file(run_dir / stage / "model.safetensors").items():
            state[f"{stage}.{name}"] = tensor
        rows = [json.loads(line) for line in (run_dir / stage / "metrics.jsonl").read_text().splitlines()]
        state[f"{stage} metrics"] = [
            {k: v for k, v in row.items() if not re.search("second|gflops|mfu", k)} for row in rows
        ]
    results = json.loads((run_dir / "results.json").read_text())
    return state | {key: results[key] for key in ("accuracy", "intervals", "points")}


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    assert a.keys() == b.keys()
    return all(torch.equal(v, b[k]) if isinstance(v, torch.Tensor) else v == b[k] for k, v in a.items())


def test_a_recipe_leaves_what_it_promises(straight: Path) -> None:
    out = straight / "out"
    results = json.loads((out / "results.json").read_text())
    single = {"no_think", "think", "before_rl", "after_rl", "without_tool", "with_tool"}
    for table in (results["accuracy"], results["intervals"]):
        assert single | {"by_budget"} <= set(table) and len(table["by_budget"]) >= 4
    for key in single:
        low, high = results["intervals"][key]
        assert 0 <= low <= results["accuracy"][key] <= high <= 1
    for budget, value in results["accuracy"]["by_budget"].items():
        low, high = results["intervals"]["by_budget"][budget]
        assert low <= value <= high
    assert results["seconds"] > 0 and results["seed"] == 0 and results["commit"] and "torch" in results["versions"]
    assert all(results["tokens_per_second"][f"{s}/tokens_per_second"] > 0 for s in ("sft", "rl"))
    page = (out / "report.html").read_text()
    assert page.count("<svg") >= 5 and not re.search(r"""(?:src|href)=["'](?:https?:)?//""", page)
    printed = (straight / "stdout").read_text()
    assert (
        "Does thinking help?" in printed and "trivet chat" in printed and str(out / "rl") in printed.replace("\n", "")
    )
    for stage in ("sft", "dense", "rl"):
        names = {p.name for p in (out / stage).iterdir()}
        assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "done.json"} <= names
    assert "sft " in (straight / "stderr").read_text()  # progress, as lines, without a terminal


def test_killed_anywhere_it_ends_with_the_same_bits(straight: Path, tmp_path: Path) -> None:
    rng, kills = random.Random(), 0  # other moments every time, on purpose
    for stage in ("sft", "rl", "evaluate"):
        child = subprocess.Popen(
            command(tmp_path, "out"), env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 100
        begun = tmp_path / "out" / stage / ("points.jsonl" if stage == "evaluate" else "metrics.jsonl")
        while not begun.exists() and child.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.15))
        child.send_signal(signal.SIGKILL)
        kills += child.wait() == -signal.SIGKILL
    assert kills >= 2, "the run was over before it could be killed"
    done = run(tmp_path, "out")
    assert done.returncode == 0, done.stderr
    assert same(end_state(tmp_path / "out"), end_state(straight / "out"))
    again = run(tmp_path, "out")
    assert again.returncode == 0 and again.stderr.count("complete, skipped") == 4


def test_another_seed_is_another_run(straight: Path, tmp_path: Path) -> None:
    """The twin: the comparison above can fail. And a seed reaches every stage."""
    done = run(tmp_path, "out", "seed=1")
    assert done.returncode == 0, done.stderr
    mine, other = end_state(tmp_path / "out"), end_state(straight / "out")
    assert not same(mine, other)
    for stage in ("sft", "dense", "rl"):
        assert mine[f"{stage} metrics"] != other[f"{stage} metrics"]
    recipe = validate({"name": "x", "stages": {}}, Recipe, "x")
    assert recipe.seed == 0
    train = TrainStage.model_validate({"model": {"d_model": 8, "pattern": "a/b", "mixers": {"a": {"kind": "lightning", "heads": 1, "head_dim": 8}}, "ffns": {"b": {"kind": "swiglu", "hidden": 8}}}, "tasks": [{"name": "chain"}], "train": {"steps": 1, "rows": 1, "length": 8, "seed": 5}})  # fmt: skip
    rl = RLStage.model_validate({"start": "a", "tasks": [{"name": "chain"}], "rl": {"steps": 1}})
    assert train.reseeded(3).train.seed == 8 and rl.reseeded(3).rl.seed == 3  # type: ignore[union-attr]


def limit_file_size() -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that a write fails with an error, as on a full disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (9_000, 9_000))


def test_out_of_disk_is_one_sentence_and_the_same_command_goes_on(straight: Path, tmp_path: Path) -> None:
    done = run(tmp_path, "out", preexec_fn=limit_file_size)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("trivet: Could not write") and "run the same command again" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "out" / "sft").glob("**/.*partial"))
    done = run(tmp_path, "out")
    assert done.returncode == 0, done.stderr
    assert same(end_state(tmp_path / "out"), end_state(straight / "out"))


@pytest.mark.parametrize(
    ("stage", "longer"), [("sft", "stages.sft.train.steps=5000"), ("rl", "stages.rl.rl.steps=500")]
)
def test_ctrl_c_says_how_to_go_on(stage: str, longer: str, tmp_path: Path) -> None:
    """In the process itself, and in a worker of it; nothing goes on running afterwards."""
    child = subprocess.Popen(
        command(tmp_path, "out", longer), env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    metrics = tmp_path / "out" / stage / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not metrics.exists() and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    child.send_signal(signal.SIGINT)
    _, said = child.communicate(timeout=60)
    assert child.returncode == 130 and "The same command goes on from there" in said and "Traceback" not in said, said
    lines = metrics.read_text()
    assert list((tmp_path / "out" / stage / "resume").glob("step-*"))
    time.sleep(1)
    assert metrics.read_text() == lines


def test_waves_hold_what_waits_for_nothing() -> None:
    def train(start: str | None, threads: int) -> TrainStage:
        table = {"model": None} if start else {"model": {"d_model": 8, "pattern": "a/b", "mixers": {"a": {"kind": "lightning", "heads": 1, "head_dim": 8}}, "ffns": {"b": {"kind": "swiglu", "hidden": 8}}}}  # fmt: skip
        steps = {"steps": 1, "rows": 1, "length": 8}
        return TrainStage.model_validate(
            table | {"start": start, "tasks": [{"name": "chain"}], "threads": threads, "train": steps}
        )

    stages: dict[str, Any] = {
        "a": train(None, 1),
        "b": train(None, 1),
        "c": train("a", 1),
        "d": train(None, 2),
        "e": train("c", 0),
    }
    assert waves(stages, 2) == [["a", "b"], ["c"], ["d"], ["e"]]
    assert waves(stages, 3) == [["a", "b"], ["c"], ["d"], ["e"]] and waves(stages, 1)[0] == ["a"]
    assert [len(wave) for wave in waves(stages, 0)] == [1] * 5  # nobody said how many threads there are
    assert waves({"a": train("b", 1), "b": train("a", 1)}, 2) == [["a"], ["b"]]  # a ring: the first says what it misses


def test_changed_settings_are_refused(straight: Path) -> None:
    done = subprocess.run(
        [*command(straight, "out"), "stages.sft.train.steps=31"], capture_output=True, text=True, env=ENV, timeout=60
    )
    assert done.returncode == 1 and "was run with train.steps = 30, now it is 31" in done.stderr
    assert "Traceback" not in done.stderr


def test_what_changes_no_result_may_change_between_two_sittings() -> None:
    """Said once, where a setting is defined: for a run's state and for a stage's."""
    asked = {"kind": "rl", "start": "x", "tasks": [{"name": "chain"}], "rl": {"steps": 2}}
    one = validate(asked, RLStage, "a")
    free = {
        "workers": 3,
        "ray_address": "x:1",
        "recompute": True,
        "page_every": 2,
        "save_every_seconds": 1,
        "tensorboard": False,
    }
    for name, value in (free | {"server": {"url": "u", "like": "l", "folder": "f"}}).items():
        other = validate(asked | {"rl": {"steps": 2, name: value}}, RLStage, "b")
        assert other != one and other.identity() == one.identity(), name
        assert name not in other.rl.identity() and other.rl.identity() == one.rl.identity()
    for name, value in {"steps": 3, "group": 3, "lag": 1, "precision": "bf16"}.items():  # the twin
        assert validate(asked | {"rl": {"steps": 2, name: value}}, RLStage, "b").identity() != one.identity(), name
    train = TrainConfig(steps=2, rows=1, length=8)
    shards = {"shards", "expert_shards", "recompute", "offload", "save_every_seconds", "tensorboard"}
    assert train.model_dump().keys() - train.identity().keys() == shards


def test_stages_are_checked() -> None:
    base = {
        "name": "x",
        "stages": {"a": {"kind": "rl", "start": "b", "tasks": [{"name": "chain"}], "rl": {"steps": 1}}},
    }
    with pytest.raises(UserError, match=r"unknown key 'stages.a.rl.stepz'. Did you mean 'steps'"):
        validate(json.loads(json.dumps(base).replace('"steps"', '"stepz"')), Recipe, "x.toml")
    with pytest.raises(UserError, match="letters, digits"):
        validate({"name": "x", "stages": {"a b": base["stages"]["a"]}}, Recipe, "x.toml")  # type: ignore[index]
    with pytest.raises(UserError, match="either `start`"):
        validate({"train": {"steps": 1, "rows": 1, "length": 8}, "tasks": [{"name": "chain"}]}, TrainStage, "x.toml")
