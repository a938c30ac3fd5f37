"""The report's structure, on made-up numbers (a fixture, not a claim)."""

from __future__ import annotations

import json
import math
import random
import re
from pathlib import Path

import pytest

from trivet.config import UserError
from trivet.measure import results as m
from trivet.measure.report import about, read_results, render, write_report
from trivet.measure.stats import wilson

pytest.importorskip("matplotlib", reason="the report's plots need the `report` extra")


def share(mean: float, count: int = 512) -> m.Share:
    low, high = wilson(round(mean * count), count)
    return m.Share(mean=mean, low=low, high=high, count=count)


def point(
    mean: float, task: str = "chain", budget: m.Budget = None, temperature: float = 0.0, tools: bool = True
) -> m.Result:
    return m.Result(
        task=task, split="test", thinking=budget, temperature=temperature, tools=tools, seed=1, questions=512,
        accuracy=share(mean), statuses={"ok": 510, "error": 2}, thinks=0.98, calls_tool=0.5, budget_hit=0.25,
        truncated=0.01, mean_tokens=31.5, mean_reasoning_tokens=27.0, tokens_per_second=15000.0,
    )  # fmt: skip


def transcript(score: float | None, text: str = "7+3=0-2=8") -> m.Transcript:
    pieces = (m.Piece(kind="thinking", text=text), m.Piece(kind="call", text="74+20"), m.Piece(kind="result", text="94"),
              m.Piece(kind="answer", text="8"))  # fmt: skip
    return m.Transcript(prompt="7+3-2=", pieces=pieces, expected="8", score=score, tokens=14, budget_hit=score is None)


def fixture() -> tuple[m.Report, dict[str, list[dict[str, float]]]]:
    budgets: list[m.Budget] = [0, 4, 8, 16, 32, None]
    curves = [
        m.Curve(task=task, model=model, points=tuple(point(min(0.97, (0.1 + 0.16 * i) * f), task, b) for i, b in enumerate(budgets)))
        for task in ("chain", "search") for model, f in (("before RL", 0.9), ("after RL", 1.0))
    ]  # fmt: skip
    report = m.Report(
        title="Demo <fixture>", intro="Made-up numbers.",
        headline=(m.Headline(claim="Does thinking help?", values={"no thinking": share(0.12), "thinking": share(0.95)}),
                  m.Headline(claim="Does RL help on longer chains?", values={"before": share(0.17), "after": share(0.46)})),
        budgets=tuple(curves),
        tools=tuple(m.ToolBars(task="arithmetic", model=w, with_tool=point(a), without=point(0.01, tools=False))
                    for w, a in (("before RL", 0.55), ("after RL", 0.96))),
        sampling=tuple(m.SamplingBars(task="chain", model=w, greedy=point(a), sampled=point(b, temperature=1.0))
                       for w, a, b in (("before RL", 0.95, 0.68), ("after RL", 0.97, 0.93))),
        experts=(m.ExpertLoad(model="tool", top_k=2, shares=tuple(tuple(0.2 + 0.05 * math.sin(i * 3 + j) for i in range(8)) for j in range(3))),),
        models=(m.ModelRow(name="sparse", params=490_000, active_params=210_000, cache_bytes_per_token=240, loss=0.31, accuracy={"search": share(0.8)},
                           train_seconds=225.0, train_tokens_per_second=10900.0),
                m.ModelRow(name="dense", params=300_000, active_params=300_000, cache_bytes_per_token=240)),
        samples=(m.Samples(model="before RL", transcripts=(transcript(0.0, "<script>alert(1)</script>"), transcript(1.0))),
                 m.Samples(model="after RL", transcripts=(transcript(None),))),
        notes=("One seed.",), seconds={"sft": 171.0, "rl": 95.2}, about=about(1, "cpu"),
    )  # fmt: skip
    rng = random.Random(0)
    sft = [{"step": s, "loss": 3 * math.exp(-s / 60) + 0.1 + rng.random() * 0.03} for s in range(1, 300, 5)]
    rl = [{"step": s, "reward": 0.3 + 0.006 * s + rng.gauss(0, 0.02), "reward/chain": 0.25 + 0.006 * s + rng.gauss(0, 0.03),
           "reward/arithmetic": 0.4 + 0.005 * s, "thinks": 0.8 + 0.002 * s, "calls_tool": 0.5, "budget_hit": 0.0, "no_spread": 0.5 - 0.003 * s}
          for s in range(1, 80)]  # fmt: skip
    return report, {"sft": sft, "rl": rl}


def test_page_holds_every_part_and_loads_nothing() -> None:
    page = render(*fixture())
    for part in (
        "headline",
        "budgets",
        "loss",
        "reward",
        "sampling",
        "tools",
        "models",
        "experts",
        "notes",
        "points",
        "about",
    ):
        assert f'<section id="{part}">' in page, part
    assert page.count("<svg") == page.count("</svg>") == 7
    outside = re.sub(r'xmlns(:\w+)?="[^"]*"|<!DOCTYPE[^>]*>|<!--.*?-->', "", page, flags=re.DOTALL)
    assert not re.search(r"https?://|<script|<link|@import|src=", outside)
    assert "thinking budget (tokens)" in page and "loss (nats per token)" in page  # axes say what they show
    assert "0.460" in page and "after RL" in page and 'class="thinking"' in page
    assert "#0a0b0" not in page and "var(--series-0)" in page  # colours are the page's


def test_model_output_is_escaped() -> None:
    page = render(*fixture())
    assert "<script>alert" not in page and "&lt;script&gt;alert(1)" in page
    assert "Demo &lt;fixture&gt;" in page


def test_svg_ids_are_unique() -> None:
    page = render(*fixture())
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids)) > 100
    used = re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', page)
    assert used and {a or b for a, b in used} <= set(ids)


def test_right_wrong_and_not_graded_are_told_apart() -> None:
    page = render(*fixture())
    assert page.count("&check; right") == 1 and page.count("expected 8") == 1 and page.count("not graded: ok") == 1


def test_an_empty_report_has_no_empty_parts() -> None:
    page = render(m.Report(title="Nothing yet"), {})
    assert "<section" not in page and "<svg" not in page


def test_files_round_trip(tmp_path: Path) -> None:
    report, metrics = fixture()
    for name, rows in metrics.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = write_report(report, {name: tmp_path / name for name in metrics}, tmp_path)
    assert path.read_text().count("<svg") == 7
    assert read_results(tmp_path / "results.json") == report
    with pytest.raises(UserError, match="No results"):
        read_results(tmp_path / "nothing.json")
    (tmp_path / "old.json").write_text('{"title": "x", "headlines": []}')
    with pytest.raises(UserError, match="Did you mean 'headline'"):
        read_results(tmp_path / "old.json")
