"""The road of R1 in small: every kind of stage reads what the ones before wrote; stopped anywhere, it goes on."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from trivet.config import UserError, load, validate
from trivet.recipes.kinds.preference import read_pairs
from trivet.recipes.kinds.sample import PIECE
from trivet.recipes.stages import Recipe, run_recipe

ROAD = Path(__file__).parents[1] / "configs/r1/tiny.toml"
STEPS = {"base": 60, "small": 3, "cold": 2, "sft": 4, "traces": 3}  # of training; all else is a step or two


def small() -> dict[str, Any]:
    """The real recipe, with a smaller model and next to no steps."""
    data = tomllib.loads(ROAD.read_text())
    data["stages"]["base"]["model"] |= {"d_model": 24, "pattern": "lightning/moe mla/moe"}
    for name, stage in data["stages"].items():
        if stage["kind"] == "train":
            stage["train"] |= {"steps": STEPS[name], "rows": 2, "length": 160, "overflow": "cut", "tensorboard": False}
        elif stage["kind"] == "rl":
            stage["rl"] |= {
                "steps": 2,
                "problems": 4,
                "group": 4,
                "max_tokens": 24,
                "length": 64,
                "rows": 2,
                "tensorboard": False,
            }
        elif stage["kind"] == "sample":  # an untrained model is never right: everything that was graded is kept
            stage["sample"] |= {"problems": 2 * PIECE + 8, "max_tokens": 24, "least": 0.0}
            stage["sample"].pop("alphabet", None)
        elif stage["kind"] == "preference":
            stage["preference"] |= {"steps": 3, "pairs": 4, "length": 64}
        elif stage["kind"] == "distil":
            stage["distil"] |= {"steps": 2, "answers": 8, "max_tokens": 24, "length": 64, "rows": 2}
        else:
            stage["count"] = 8
            for probe in stage["probes"]:
                probe["max_tokens"] = 24
    return data


def recipe(data: dict[str, Any]) -> Recipe:
    return validate(data, Recipe, "the road")


def run(data: dict[str, Any], out: Path, watch: Callable[[str, dict[str, Any]], None] | None = None) -> list[str]:
    said: list[str] = []
    torch.set_num_threads(1)
    run_recipe(
        recipe(data), out, torch.device("cpu"),
        lambda name, stage: (lambda metrics: watch(name, metrics) if watch else None), said.append,
    )  # fmt: skip
    return said


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("road")
    data = small()
    data["threads"] = 1  # one after the other, in this process
    run(data, out)
    return out


def end(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for file in sorted(out.glob("*/*.safetensors")):
        found |= {f"{file.parent.name}/{name}": tensor for name, tensor in load_file(file).items()}
    for file in sorted(out.glob("*/data.jsonl")):
        found[file.parent.name] = file.read_text()
    points = json.loads((out / "results.json").read_text())["points"]
    return found | {"points": {m: {p: r["accuracy"] for p, r in row.items()} for m, row in points.items()}}


def test_the_whole_road(straight: Path) -> None:
    """Every stage leaves what the next one needs, counted, and a page that shows all of it."""
    data = small()
    assert {p.name for p in straight.iterdir() if p.is_dir()} == set(data["stages"])
    select = json.loads((straight / "select/done.json").read_text())
    lines = [json.loads(line) for line in (straight / "select/data.jsonl").read_text().splitlines()]
    assert select["kept"] == len(lines) and select["answers"] == 2 * select["problems"]
    left_out = sum(
        n for name, n in select.items() if name not in ("problems", "answers", "kept", "problems without any")
    )
    assert select["kept"] + left_out == select["answers"]  # nothing is lost without a reason
    assert all(line["mode"] == "think" and line["messages"][-1]["reasoning"] is not None for line in lines)
    pairs = read_pairs(straight / "pairs/data.jsonl")
    assert pairs and all(pair.chosen != pair.rejected and pair.question[0].content.startswith("~") for pair in pairs)
    assert (straight / "likes/reward_head.safetensors").is_file()
    last = json.loads((straight / "final/metrics.jsonl").read_text().splitlines()[-1])
    assert "reward/model" in last and "reward/alphabet" in last and "reward/task" in last
    page = (straight / "page.html").read_text()
    assert page.count("<svg") == 4 and not re.search(r"""(?:src|href)=["'](?:https?:)?//""", page)
    results = json.loads((straight / "results.json").read_text())["points"]
    assert list(results) == data["stages"]["compare"]["models"]
    for row in results.values():
        assert 0 <= row["chain"]["parts"]["alphabet"] <= 1 and "alphabet" not in row["search"]["parts"]


def test_run_again_it_skips_and_stopped_anywhere_it_goes_on(straight: Path, tmp_path: Path) -> None:
    data = small() | {"threads": 1}
    assert sum("complete, skipped" in line for line in run(data, straight)) == len(data["stages"])
    stops = {("select", 2), ("likes", 2), ("student", 1), ("compare", 7), ("final", 1)}

    def stop(name: str, metrics: dict[str, Any]) -> None:
        if (name, metrics["step"]) in stops:
            stops.remove((name, metrics["step"]))
            raise KeyboardInterrupt

    interrupts = 0
    while True:
        try:
            run(data, tmp_path, stop)
            break
        except KeyboardInterrupt:
            interrupts += 1
    assert interrupts == 5
    whole, pieces = end(straight), end(tmp_path)
    assert whole.keys() == pieces.keys()
    for key, value in whole.items():
        same = torch.equal(value, pieces[key]) if isinstance(value, torch.Tensor) else value == pieces[key]
        assert same, key


def test_other_seeds_are_other_runs_of_the_same_problems() -> None:
    made = recipe(small())
    for name, stage in made.stages.items():
        other = stage.reseeded(5)
        assert (other == stage) == (stage.kind == "compare"), name
        assert other.reseeded(-5) == stage


def test_the_real_recipe_is_whole() -> None:
    """Every name that a stage reads is a stage before it."""
    made, seen = load(ROAD, Recipe), set[str]()
    for name, stage in made.stages.items():
        assert stage.inputs() <= seen, name
        seen.add(name)


def test_pairs_that_can_not_be_used_are_named(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"question": "a", "chosen": "b", "rejected": "c"}\n{"question": "a", "chosen": "b"}\n')
    with pytest.raises(UserError, match="line 2: 'rejected' is missing"):
        read_pairs(path)
    path.write_text('{"question": [{"role": "user", "content": "a"}], "chosen": "b", "rejected": "c"}\n')
    assert read_pairs(path)[0].question[0].content == "a"
    with pytest.raises(UserError, match="can't be read"):
        read_pairs(tmp_path / "none.jsonl")
