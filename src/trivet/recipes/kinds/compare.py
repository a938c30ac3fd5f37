"""Stages side by side: every model on every probe, with intervals, and what RL changed on the way.

A probe is a task and a way of sampling. Written: points.jsonl as they are measured (an interrupted comparison goes on),
results.json and page.html in the run's directory.
"""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import Field
from rich.console import Console
from rich.table import Table

from trivet.disk import Journal, write_atomic
from trivet.hub.checkpoint import load_pair
from trivet.measure import plots
from trivet.measure.evaluate import evaluate
from trivet.measure.report import about, pages
from trivet.measure.results import Budget, Result
from trivet.messages import Sampling
from trivet.recipes.judging import known_rewards
from trivet.recipes.kinds.base import Context, StageBase
from trivet.rl.rewards import make_rewards
from trivet.spec import Frozen
from trivet.tasks import make_task


class Probe(Frozen):
    """What is measured of every model."""

    label: str = Field(description="what it is called in tables")
    task: dict[str, Any] = Field(description="a task: name and settings")
    temperature: float = Field(default=1.0, ge=0, description="0 is greedy")
    thinking: Budget = Field(default=None, description="thinking budget; 'off': the block is shut")
    max_tokens: int = Field(default=256, gt=0, description="tokens of an answer, thinking included")
    rewards: tuple[dict[str, Any], ...] = Field(default=(), description="terms that are watched; weight = 0")


class CompareStage(StageBase):
    """A table of models and probes, curves of RL stages, transcripts."""

    kind: Literal["compare"] = "compare"
    models: tuple[str, ...] = Field(min_length=1, description="stages or model directories, in the order shown")
    probes: tuple[Probe, ...] = Field(min_length=1, description="what is measured")
    curves: tuple[str, ...] = Field(default=(), description="RL stages whose metrics over steps are drawn")
    watch: tuple[str, ...] = Field(default=("accuracy", "reasoning_tokens"), description="metrics that are drawn")
    count: int = Field(default=256, gt=0, description="problems a point")
    seed: int = Field(default=1, description="of the sampling; problems are always the same")

    def inputs(self) -> set[str]:
        return {*self.models, *self.curves}


def run(stage: CompareStage, context: Context) -> dict[str, Any]:
    rows = _measure(stage, context)
    facts = about(context.recipe.seed if context.recipe else 0, str(context.device))
    results = {
        "points": {m: {label: json.loads(r.model_dump_json(exclude={"samples"})) for label, r in row.items()} for m, row in rows.items()},
        "about": facts,
    }  # fmt: skip
    write_atomic(context.run / "results.json", json.dumps(results, indent=1) + "\n")
    write_atomic(context.run / "page.html", _page(stage, context, rows, facts))
    _print(stage, rows)
    context.say(f"page: {context.run / 'page.html'}")
    return {"points": sum(map(len, rows.values()))}


def _measure(stage: CompareStage, context: Context) -> dict[str, dict[str, Result]]:
    journal = Journal(context.out / "points.jsonl")
    known = {(line["model"], line["probe"]): Result.model_validate(line["result"]) for line in journal.read()}
    total = len(stage.models) * len(stage.probes)
    for name in stage.models:
        missing = [probe for probe in stage.probes if (name, probe.label) not in known]
        if not missing:
            continue
        model, chat = load_pair(context.find(name), context.device)
        for probe in missing:
            rewards = make_rewards(probe.rewards, known_rewards(context.find, context.device))
            sampling = Sampling(temperature=probe.temperature, thinking=probe.thinking, max_tokens=probe.max_tokens)
            task = make_task(probe.task)
            result = evaluate(model, chat, task, count=stage.count, sampling=sampling, seed=stage.seed, rewards=rewards)
            known[name, probe.label] = result
            line = {"model": name, "probe": probe.label, "result": json.loads(result.model_dump_json())}
            journal.append(len(known), **line)
            if context.progress is not None:
                context.progress({"step": len(known), "steps": total, "point": f"{name}: {probe.label}"})
    return {m: {probe.label: known[m, probe.label] for probe in stage.probes} for m in stage.models}


def _page(stage: CompareStage, context: Context, rows: dict[str, dict[str, Result]], facts: dict[str, str]) -> str:
    from markupsafe import Markup

    metrics = {name: Journal(context.run / name / "metrics.jsonl").read() for name in stage.curves}
    curves = plots.learning_curves(metrics, stage.watch)
    rewards = [(f"Reward of {name}", plots.reward_curve(name, lines)) for name, lines in metrics.items()]
    figures = [("Over RL", curves), *rewards]
    how = "; ".join(
        f"{p.label}: {'greedy' if p.temperature == 0 else f'T = {p.temperature:g}'}"
        + ("" if p.thinking is None else f", thinking {p.thinking}")
        for p in stage.probes
    )
    return str(
        pages()
        .get_template("compare.html.jinja")
        .render(
            title=context.recipe.name if context.recipe else "comparison",
            intro=f"Every point is {stage.count} held-out problems, which training could not have drawn.",
            sampled=how,
            probes=stage.probes,
            rows=rows,
            parts=sorted({part for row in rows.values() for r in row.values() for part in r.parts if part != "task"}),
            figures=[(title, Markup(svg)) for title, svg in figures if svg],
            about=facts,
        )
    )


def _print(stage: CompareStage, rows: dict[str, dict[str, Result]]) -> None:
    table = Table(box=None, pad_edge=False)
    table.add_column("stage")
    for probe in stage.probes:
        table.add_column(probe.label, justify="right")
    for name, row in rows.items():
        table.add_row(name, *(f"{row[p.label].accuracy.mean:.3f}" for p in stage.probes))
    Console().print(table)
