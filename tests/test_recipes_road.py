"""The road of R1 in small: every kind of stage reads what the ones before wrote; stopped anywhere, it goes on."""

from __future__ import annotations

import json
import math
import re
import tomllib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from test_chat_template import QWEN3, folder_of
from trivet.agent.loop import Episode, ModelStep
from trivet.config import UserError, load, validate
from trivet.messages import Completion, Message, Sampling, Score, StopReason
from trivet.recipes.kinds.preference import read_pairs
from trivet.recipes.kinds.sample import PIECE, SampleConfig, _pairs
from trivet.recipes.stages import Recipe, run_recipe
from trivet.rl.rollout import Attempt, Job
from trivet.tasks import Problem, make_task

ROAD = Path(__file__).parents[1] / "configs/r1/tiny.toml"
QWEN = ROAD.with_name("qwen3.toml")
STEPS = {"base": 60, "small": 3, "cold": 2, "sft": 4, "traces": 3}  # of training; all else is a step or two


TASTE = [  # what an untrained model's own answers do not give: enough pairs
    {"question": f"~{a}{b}123", "chosen": f"{min(a, b)}{max(a, b)}", "rejected": f"{max(a, b)}{min(a, b)}"}
    for a in range(10) for b in range(a)
]  # fmt: skip


def write_lines(path: Path, lines: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


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
            stage["sample"] |= {"problems": 3 * PIECE + 8, "max_tokens": 48, "least": 0.0}
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
    data["stages"]["likes"]["pairs"] = write_lines(out / "pairs.jsonl", TASTE)
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
    pairs = json.loads((straight / "pairs/done.json").read_text())
    assert pairs["kept"] + pairs["problems without two that differ"] + pairs["repeated"] == pairs["problems"]
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
    data["stages"]["likes"]["pairs"] = str(straight / "pairs.jsonl")
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
    for path in (ROAD, QWEN):
        seen = set[str]()
        for name, stage in load(path, Recipe).stages.items():
            assert {read for read in stage.inputs() if "." not in read} <= seen, name  # others are files
            seen.add(name)


def test_the_road_on_a_checkpoint_with_lora(tmp_path: Path) -> None:
    """configs/r1/qwen3.toml on a checkpoint of transformers' making: adapters all the way, the base untouched."""
    transformers = pytest.importorskip("transformers")
    base = folder_of(tmp_path / "base", QWEN3)
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, head_dim=8,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True, initializer_range=0.2,
    )  # fmt: skip
    transformers.Qwen3ForCausalLM(config).save_pretrained(base)
    before = {file.name: file.read_bytes() for file in base.iterdir()}
    asked = [(a, b) for a in range(10) for b in range(10) if a != b]
    questions = write_lines(
        tmp_path / "q.jsonl", [{"question": f"{a} or {b}?", "answer": str(max(a, b))} for a, b in asked]
    )
    said = [
        {"messages": [{"role": "user", "content": f"{a} or {b}?"}, {"role": "assistant", "reasoning": f"{max(a, b)}", "content": str(max(a, b))}]}
        for a, b in asked
    ]  # fmt: skip
    data = tomllib.loads(QWEN.read_text()) | {"threads": 1}
    files = {"questions.jsonl": questions, "cold.jsonl": write_lines(tmp_path / "c.jsonl", said)}
    liked = [{"question": f"{a} or {b}?", "chosen": str(max(a, b)), "rejected": str(min(a, b))} for a, b in asked]
    files["pairs.jsonl"] = write_lines(tmp_path / "p.jsonl", liked)
    short = {"length": 128, "rows": 2, "steps": 2, "max_tokens": 96, "tensorboard": False, "precision": "fp32"}
    short |= {"problems": 2, "group": 2, "pairs": 4, "answers": 4, "n": 2, "mismatch_limit": 0.1, "least": 0.0}
    for name, stage in data["stages"].items():
        for key in ("start", "models"):
            if key in stage:
                stage[key] = json.loads(re.sub(r"\./Qwen3-[.\d]+B", str(base), json.dumps(stage[key])))
        for task in [*stage.get("tasks", ()), *(probe["task"] for probe in stage.get("probes", ()))]:
            task["path"] = files.get(task["path"], task["path"])
        if name == "likes":
            stage["pairs"] = files["pairs.jsonl"]
        table = stage.get({"preference": "preference", "compare": ""}.get(stage["kind"], stage["kind"]), {})
        table |= {
            key: value
            for key, value in short.items()
            if key in table or (key == "tensorboard" and stage["kind"] in ("train", "rl"))
        }
        for probe in stage.get("probes", ()):
            probe["max_tokens"] = 96
    del data["stages"]["cold"]["lora"]  # all weights: adapters of random weights do not learn to end a turn
    data["stages"]["cold"]["train"] |= {"steps": 60, "rows": 8, "muon_lr": 0.02, "adam_lr": 0.003}
    data["stages"]["compare"]["count"] = 8
    data["stages"]["select"]["sample"] |= {"problems": 64, "least": 0.0}
    run(data, tmp_path / "out")
    assert {file.name: file.read_bytes() for file in base.iterdir()} == before
    for name in ("reason", "sft", "final", "student"):
        assert (tmp_path / "out" / name / "adapter_model.safetensors").is_file(), name
        assert not (tmp_path / "out" / name / "model.safetensors").exists(), name
    assert (tmp_path / "out/likes/model.safetensors").is_file()  # merged, so that it can be loaded alone
    assert (tmp_path / "out/select/data.jsonl").read_text().count("\n") > 8
    points = json.loads((tmp_path / "out/results.json").read_text())["points"]
    right = {name: row["no thought"]["accuracy"]["mean"] for name, row in points.items()}
    assert right["cold"] > right[str(base)] + 0.2


def test_raters_choose_between_two_answers_that_differ() -> None:
    """Of each problem the first two with different scores; the better one is preferred as often as Bradley and Terry say."""
    task, sampling = make_task({"name": "arrange"}), Sampling()

    def attempt(problem: Problem, text: str, score: float) -> Attempt:
        done = Completion(text, (), (), (), (), StopReason.END, ())
        episode = Episode(
            tuple(problem.messages), (ModelStep(Message("assistant", text, completion=done)),), StopReason.END
        )
        return Attempt(Job(task, problem, sampling), episode, Score(score))

    groups = []
    for i in range(2000):
        problem = task.problem("train", i)
        groups.append(
            [attempt(problem, text, score) for text, score in (("a", 0.5), ("b", 0.5), ("c", 1.0), ("d", 0.0))]
        )
    groups.append([attempt(task.problem("train", 0), text, 0.5) for text in "ab"])
    counts: Counter[str] = Counter()
    pairs = list(_pairs(groups, SampleConfig(problems=1, keep="pairs", sharpness=2.0), 0, counts))
    assert len(pairs) == 2000 and counts["problems without two that differ"] == 1
    assert all({pair["chosen"], pair["rejected"]} == {"a", "c"} for pair in pairs)
    preferred = sum(pair["chosen"] == "c" for pair in pairs) / len(pairs)
    assert abs(preferred - 1 / (1 + math.exp(-2 * 0.5))) < 0.04


def test_what_may_change_between_two_sittings(tmp_path: Path) -> None:
    data = small() | {"threads": 1}
    data["stages"] = {"base": data["stages"]["base"]}
    data["stages"]["base"]["train"]["steps"] = 1
    run(data, tmp_path)
    train = data["stages"]["base"]["train"]
    train |= {"save_every_seconds": 5.0, "recompute": True}
    assert "complete, skipped" in run(data, tmp_path)[0]
    train["seed"] = 5
    with pytest.raises(UserError, match=r"train.seed = 0, now it is 5"):
        run(data, tmp_path)


def test_examples_that_never_think_are_pointed_out(tmp_path: Path) -> None:
    """Whoever trains on answers alone and evaluates with thinking wonders why nothing was learnt."""
    for share, points_out in ((1.0, True), (0.5, False)):
        data = small() | {"threads": 1}
        stage = data["stages"]["base"]
        stage["tasks"], stage["train"]["steps"] = [{"name": "arrange", "no_think": share}], 1
        data["stages"] = {"base": stage}
        said = run(data, tmp_path / str(share))
        assert any("--no-think" in line for line in said) == points_out


def test_pairs_that_can_not_be_used_are_named(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"question": "a", "chosen": "b", "rejected": "c"}\n{"question": "a", "chosen": "b"}\n')
    with pytest.raises(UserError, match="line 2: 'rejected' is missing"):
        read_pairs(path)
    path.write_text('{"question": [{"role": "user", "content": "a"}], "chosen": "b", "rejected": "c"}\n')
    assert read_pairs(path)[0].question[0].content == "a"
    with pytest.raises(UserError, match="can't be read"):
        read_pairs(tmp_path / "none.jsonl")
