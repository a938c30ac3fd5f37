"""`[[rewards]]` and `curriculum` from a stage's table to its metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from test_rl_learner import CHAT, make
from trivet.config import UserError, validate
from trivet.disk import Journal
from trivet.recipes.adapted import save_result
from trivet.recipes.stages import Context, RLStage, TrainStage, run_stage

RL = {
    "steps": 1, "problems": 2, "group": 2, "max_tokens": 8, "rows": 4, "length": 64, "tensorboard": False,
    "not_ok_limit": 1.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("start")
    save_result(make(noise=0.3), CHAT, path, None)
    return str(path)


def metrics(start: str, out: Path, rewards: list[dict[str, Any]], **task: Any) -> dict[str, Any]:
    tables = {"start": start, "tasks": [{"name": "chain", **task}], "rewards": rewards, "rl": RL}
    stage = validate(tables, RLStage, "test")
    run_stage(stage, Context(out, out.parent, None, torch.device("cpu"), None, print))
    return Journal(out / "metrics.jsonl").read()[-1]


def test_terms_of_a_stage_reach_its_metrics(start: str, tmp_path: Path) -> None:
    terms = [{"name": "length", "weight": 0.5, "limit": 8}, {"name": "format", "weight": 0.25}]
    found = metrics(start, tmp_path / "rl", terms, curriculum=True)
    assert found["reward"] == pytest.approx(
        found["reward/task"] + 0.5 * found["reward/length"] + 0.25 * found["reward/format"]
    )
    assert found["reward/length"] < 0 and found["level/chain"] == 2


def test_a_judge_is_a_model_of_ones_own(start: str, tmp_path: Path) -> None:
    """This one writes noise: it is asked, and none of its answers is a score."""
    found = metrics(
        start,
        tmp_path / "rl",
        [{"name": "judge", "weight": 1.0, "model": start, "max_tokens": 4, "template": "{answer}"}],
    )
    assert found["not_ok"] == found["not_ok/unparsed"] == 4 and "reward/judge" not in found
    with pytest.raises(UserError, match="'nobody' is neither a stage nor a directory"):
        metrics(start, tmp_path / "no", [{"name": "judge", "weight": 1.0, "model": "nobody"}])


def test_a_stage_that_imitates_has_no_curriculum(start: str, tmp_path: Path) -> None:
    tables = {
        "start": start,
        "tasks": [{"name": "chain", "curriculum": True}],
        "train": {"steps": 1, "rows": 1, "length": 64},
    }
    stage = validate(tables, TrainStage, "test")
    with pytest.raises(UserError, match="leave `curriculum` to a stage of RL"):
        run_stage(stage, Context(tmp_path / "sft", tmp_path, None, torch.device("cpu"), None, print))
