"""The demo's evaluation: what thinking, budgets, RL, the tool and sparsity were worth, on unseen problems.

Every point is `count` test problems. Points are kept in points.jsonl as they are measured, so an
interrupted evaluation goes on where it was. Nothing here computes an accuracy of its own: all of it
is `measure.evaluate`, and the report repeats every number with its interval.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from trivet.chat import Chat
from trivet.disk import Journal, write_atomic
from trivet.hub.checkpoint import load_any
from trivet.measure.evaluate import evaluate
from trivet.measure.report import about, render
from trivet.measure.results import (
    Budget,
    Curve,
    ExpertLoad,
    Headline,
    ModelRow,
    Report,
    Result,
    Samples,
    SamplingBars,
    Share,
    ToolBars,
)  # fmt: skip
from trivet.messages import Sampling
from trivet.model import Routing, Transformer
from trivet.recipes.kinds.base import Context
from trivet.recipes.kinds.report import ReportStage
from trivet.recipes.stages import waves
from trivet.recipes.workers import Tell, side_by_side
from trivet.tasks import Task, make_task
from trivet.train.data import Mixture, PackedBatches, TaskDocuments

CHAIN_BUDGETS: tuple[Budget, ...] = (0, 8, 15, 22, 29, None)  # a step is 3 or 4 tokens, the start 1
COMPARED = (("chain", 0.0), ("longer chain", 0.0), ("search", 1.0), ("arithmetic", 0.0))  # sparse against dense
BEFORE, AFTER = "before RL", "after RL"
MAX_TOKENS = {"chain": 96, "longer chain": 128, "arithmetic": 96, "search": 256}
SEARCH_BUDGETS: tuple[Budget, ...] = (0, 13, 26, 52, 104, 208)  # an attempt is 13 tokens


@dataclass(frozen=True)
class Point:
    """One measurement: which model, on what, sampled how."""

    model: str
    task: str
    thinking: Budget = None
    temperature: float = 0.0
    tools: bool = True

    @property
    def key(self) -> str:
        shut = "" if self.tools else ", no tools"
        budget = "" if self.thinking is None else f", thinking {self.thinking}"
        return f"{self.model}: {self.task}, T={self.temperature:g}{budget}{shut}"


def points(models: list[str]) -> Iterator[Point]:
    """Everything that is measured, in order: `models` are cold, final and perhaps the dense twin."""
    for model in models[:2]:
        for task, budgets, temperature in (("chain", CHAIN_BUDGETS, 0.0), ("search", SEARCH_BUDGETS, 1.0)):
            for budget in budgets:
                yield Point(model, task, budget, temperature)
        for task in ("chain", "longer chain", "arithmetic"):
            yield Point(model, task, temperature=0.0)
            yield Point(model, task, temperature=1.0)
        yield Point(model, "search", None, 0.0)
        yield Point(model, "search", None, 1.0)
        yield Point(model, "chain", "off")
        yield Point(model, "search", "off")
        yield Point(model, "arithmetic", tools=False)
        yield Point(model, "arithmetic", "off", tools=False)
    for model in models[2:]:
        for task, temperature in COMPARED:
            yield Point(model, task, temperature=temperature)


def tasks_of(stage: ReportStage) -> dict[str, Task]:
    (low, high), (longer, longest) = stage.short_chains, stage.longer_chains
    return {
        "chain": make_task({"name": "chain", "min_steps": low, "max_steps": high}),
        "longer chain": make_task({"name": "chain", "min_steps": longer, "max_steps": longest}),
        "search": make_task({"name": "search"}),
        "arithmetic": make_task({"name": "arithmetic"}),
    }


def report(stage: ReportStage, context: Context) -> dict[str, Any]:
    """Measure all points, write results.json and report.html beside the stages, print the table."""
    began = time.perf_counter()
    names = [name for name in (stage.cold, stage.final, stage.dense) if name is not None]
    models = {name: load_any(context.run / name, context.device).eval() for name in names}
    chats = {name: Chat.load(context.run / name) for name in names}
    found = _measure(stage, context, names)
    seconds = _seconds(context)
    results = summarise(stage, found)
    results["stage_seconds"] = {**seconds, context.out.name: time.perf_counter() - began}
    results["seconds"] = _wall(context, results["stage_seconds"])
    results["tokens_per_second"] = _speeds(context) | {"evaluation": _mean_speed(found)}
    seed = context.recipe.seed if context.recipe else 0
    facts = about(seed, str(context.device))
    results |= {"seed": seed, "commit": facts["commit"], "versions": facts}
    page = assemble(stage, context, names, models, chats, found, results)
    stages = list(context.recipe.stages) if context.recipe else names
    metrics = {
        name: Journal(context.run / name / "metrics.jsonl").read() for name in stages if name != context.out.name
    }
    results["report"] = json.loads(page.model_dump_json())
    write_atomic(context.run / "results.json", json.dumps(results, indent=1) + "\n")
    write_atomic(context.run / "report.html", render(page, {name: rows for name, rows in metrics.items() if rows}))
    _print(stage, context, found, results)
    return {"points": len(found), "seconds": results["stage_seconds"][context.out.name]}


def _measure(stage: ReportStage, context: Context, names: list[str]) -> dict[Point, Result]:
    """All points, those of an interrupted run from its journal; on a CPU a process for each thread."""
    journal = Journal(context.out / "points.jsonl")
    wanted = {point.key: point for point in points(names)}
    known = {line["key"]: Result.model_validate(line["result"]) for line in journal.read()}

    def keep(key: str, result: Result) -> None:
        known[key] = result
        journal.append(len(known), key=key, result=json.loads(result.model_dump_json()))
        if context.progress is not None:
            context.progress({"step": len(known), "steps": len(wanted), "point": key})

    jobs = {
        key: partial(_one_point, stage, context.run, point, context.device)
        for key, point in wanted.items()
        if key not in known
    }
    workers = (stage.threads or torch.get_num_threads()) if context.device.type == "cpu" else 1
    if workers == 1:
        for key, job in jobs.items():
            keep(key, job(None))
    elif jobs:
        for key, result in side_by_side(jobs, workers, 1, lambda name, message: None):
            keep(key, result)
    return {point: known[key] for key, point in wanted.items()}


def _one_point(stage: ReportStage, run: Path, point: Point, device: torch.device, tell: Tell | None) -> Result:
    model, chat = _load(run / point.model, device)
    sampling = Sampling(temperature=point.temperature, thinking=point.thinking, max_tokens=MAX_TOKENS[point.task])
    return evaluate(
        model,
        chat,
        tasks_of(stage)[point.task],
        count=stage.count,
        sampling=sampling,
        tools=point.tools,
        seed=stage.seed,
    )


@lru_cache(maxsize=4)
def _load(directory: Path, device: torch.device) -> tuple[Transformer, Chat]:
    return load_any(directory, device).eval(), Chat.load(directory)


# ------------------------------------------------------------------------------------------- summaries
def summarise(stage: ReportStage, found: dict[Point, Result]) -> dict[str, Any]:
    """The accuracies and intervals that results.json promises, each of one point."""
    cold, final = stage.cold, stage.final
    shares: dict[str, Share] = {
        "no_think": found[Point(final, "chain", "off")].accuracy,
        "think": found[Point(final, "chain")].accuracy,
        "before_rl": found[Point(cold, "longer chain")].accuracy,
        "after_rl": found[Point(final, "longer chain")].accuracy,
        "without_tool": _without_tool(found, final).accuracy,
        "with_tool": found[Point(final, "arithmetic")].accuracy,
    }
    curves = {
        "by_budget": {str(b): found[Point(final, "chain", b)].accuracy for b in CHAIN_BUDGETS},
        "by_budget_search": {str(b): found[Point(final, "search", b, 1.0)].accuracy for b in SEARCH_BUDGETS},
    }
    accuracy: dict[str, Any] = {key: share.mean for key, share in shares.items()}
    intervals: dict[str, Any] = {key: [share.low, share.high] for key, share in shares.items()}
    for name, curve in curves.items():
        accuracy[name] = {budget: share.mean for budget, share in curve.items()}
        intervals[name] = {budget: [share.low, share.high] for budget, share in curve.items()}
    return {"accuracy": accuracy, "intervals": intervals, "points": {p.key: r.accuracy.mean for p, r in found.items()}}


def _without_tool(found: dict[Point, Result], model: str) -> Result:
    """The better of thinking and answering at once: the tool is not compared with a handicap."""
    both = (found[Point(model, "arithmetic", tools=False)], found[Point(model, "arithmetic", "off", tools=False)])
    return max(both, key=lambda result: result.accuracy.mean)


def assemble(
    stage: ReportStage, context: Context, names: list[str], models: dict[str, Transformer], chats: dict[str, Chat],
    found: dict[Point, Result], results: dict[str, Any],
) -> Report:  # fmt: skip
    cold, final = stage.cold, stage.final
    label = {cold: BEFORE, final: AFTER}

    def acc(*args: Any, **kwargs: Any) -> Share:
        return found[Point(*args, **kwargs)].accuracy

    headline = (
        Headline(claim=f"Does thinking help? (chains of {stage.short_chains[0]} to {stage.short_chains[1]} steps, greedy)", values={"no thinking": acc(final, "chain", "off"), "thinking": acc(final, "chain")}),
        Headline(claim=f"Does RL help beyond what SFT showed? (chains of {stage.longer_chains[0]} to {stage.longer_chains[1]} steps, greedy)",
                 values={"before": acc(cold, "longer chain"), "after": acc(final, "longer chain")}),
        Headline(claim="The same at T = 1", values={"before": acc(cold, "longer chain", temperature=1.0), "after": acc(final, "longer chain", temperature=1.0)}),
        Headline(claim="Does the tool help? (two-digit arithmetic, greedy)",
                 values={"without": _without_tool(found, final).accuracy, "with": acc(final, "arithmetic")}),
        Headline(claim="Did RL teach its use? (T = 1)", values={"before": acc(cold, "arithmetic", temperature=1.0), "after": acc(final, "arithmetic", temperature=1.0)}),
    )  # fmt: skip
    budgets = tuple(
        Curve(task=task, model=label[model], points=tuple(found[Point(model, task, b, t)] for b in grid))
        for task, grid, t in (("chain", CHAIN_BUDGETS, 0.0), ("search", SEARCH_BUDGETS, 1.0))
        for model in (cold, final)
    )
    tools = tuple(
        ToolBars(
            task="arithmetic", model=label[m], with_tool=found[Point(m, "arithmetic")], without=_without_tool(found, m)
        )
        for m in (cold, final)
    )
    sampling = tuple(
        SamplingBars(task=task, model=label[m], greedy=found[Point(m, task)], sampled=found[Point(m, task, temperature=1.0)])
        for task in ("chain", "longer chain", "search", "arithmetic") for m in (cold, final)
    )  # fmt: skip
    samples = tuple(
        Samples(model=label[m], transcripts=tuple(
            t for task in ("longer chain", "search", "arithmetic") for t in found[Point(m, task, temperature=1.0)].samples[:2]
        )) for m in (cold, final)
    )  # fmt: skip
    experts = tuple(load for name in (cold, final) for load in expert_load(name, models[name], chats[name], stage))
    rows = tuple(_model_row(name, models[name], context, found, stage) for name in (cold, *names[2:]))
    return Report(
        title=context.recipe.name if context.recipe else "demo",
        intro=(
            f"A model of {models[final].spec.num_params():,} parameters ({models[final].spec.active_params():,} active a token), "
            f"trained from random weights in {results['seconds'] / 60:.1f} minutes. Every point is {stage.count} problems that "
            "training could not have drawn. Intervals are 95%."
        ),
        headline=headline, budgets=budgets, tools=tools, sampling=sampling, experts=experts,
        models=rows,
        samples=samples, notes=(*_verdict(rows), BEYOND.format(stage.short_chains[1]), *NOTES), seconds=results["stage_seconds"], about=results["versions"],
    )  # fmt: skip


BEYOND = (
    "SFT showed prompts of all these lengths, but never a thought of more than {} steps: longer chains are cut there, as a "
    "budget would cut them. 'Beyond what SFT showed' means worked out further than any example."
)
NOTES = (
    "Much of the gain at T = 1 is elicitation: SFT already knows the skill, and RL makes sampling use it. The greedy rows "
    "show what was learned beyond that.",
    "The cold start answers half of the arithmetic examples without the calculator on purpose, so that RL has a choice to make.",
    "'Without the tool' is the better of thinking and not thinking.",
    "Greedy search repeats attempts, since nothing is random in it; T = 1 is the fair way to search.",
    "The dense twin has equal active parameters and saw the same documents in the same order, SFT only. One seed each: "
    "the differences between seeds in docs/RESULTS.md are the measure for what is noise.",
)


def expert_load(name: str, model: Transformer, chat: Chat, stage: ReportStage) -> list[ExpertLoad]:
    """Share of tokens that each expert takes, on worked test examples of all tasks."""
    ks = [layer.ffn.top_k for layer in model.spec.layers if layer.ffn.kind == "moe"]
    if not ks:
        return []
    tasks = [task for key, task in tasks_of(stage).items() if key != "longer chain"]
    mixture = Mixture([TaskDocuments(task, chat, 0, split="test") for task in tasks], [1.0] * len(tasks))
    routing = Routing()
    batch = next(PackedBatches(mixture, 16, model.spec.context_length, overflow="cut")).to(model.embed.device)
    with torch.inference_mode():
        model(batch.tokens, batch.positions, routing=routing)
    shares = tuple(tuple((load / load.sum()).tolist()) for load in routing.loads)
    return [ExpertLoad(model=name, top_k=ks[0], shares=shares)]


def _model_row(
    name: str, model: Transformer, context: Context, found: dict[Point, Result], stage: ReportStage
) -> ModelRow:
    done = json.loads((context.run / name / "done.json").read_text())
    return ModelRow(
        name=f"{name}: {model.spec.pattern}", params=model.spec.num_params(), active_params=model.spec.active_params(),
        cache_bytes_per_token=model.spec.cache_bytes_per_token(4), loss=done.get("eval/loss"),
        accuracy={
            f"{task}, {'greedy' if t == 0 else 'T = 1'}": found[Point(name, task, None, t)].accuracy for task, t in COMPARED
        }, train_seconds=done.get("seconds"),
        train_tokens_per_second=done["tokens"] / done["seconds"] if "tokens" in done else None,
    )  # fmt: skip


def _verdict(rows: tuple[ModelRow, ...]) -> list[str]:
    """What sparsity bought and cost at this size, in one sentence of this run's numbers."""
    if len(rows) < 2 or not all(row.loss and row.train_tokens_per_second for row in rows[:2]):
        return []
    sparse, dense = rows[:2]
    speed = (sparse.train_tokens_per_second or 0) / (dense.train_tokens_per_second or 1)
    apart = [
        task
        for task, s in sparse.accuracy.items()
        if s.high < dense.accuracy[task].low or s.low > dense.accuracy[task].high
    ]
    return [
        f"Sparse against dense at equal active parameters: held-out loss {sparse.loss:.3f} against {dense.loss:.3f}, at "
        f"{speed:.2f} times the training speed, for {sparse.params / dense.params:.1f} times the memory. Accuracies differ "
        f"beyond their intervals on: {', '.join(apart) or 'nothing'}. Experts buy capacity, and at this size there is little to fill it with."
    ]


def _seconds(context: Context) -> dict[str, float]:
    names = [n for n in (context.recipe.stages if context.recipe else ()) if n != context.out.name]
    return {name: json.loads((context.run / name / "done.json").read_text()).get("seconds", 0.0) for name in names}


def _wall(context: Context, seconds: dict[str, float]) -> float:
    """Seconds of the whole run: of stages side by side the longest counts."""
    if context.recipe is None:
        return sum(seconds.values())
    threads = context.recipe.threads if context.device.type == "cpu" else 0
    return sum(max(seconds[name] for name in wave) for wave in waves(context.recipe.stages, threads))


def _speeds(context: Context) -> dict[str, Any]:
    """Tokens a second of each stage: trained, and for RL generated."""
    speeds: dict[str, Any] = {}
    for name in context.recipe.stages if context.recipe else ():
        rows = Journal(context.run / name / "metrics.jsonl").read()
        for key in ("tokens_per_second", "training_tokens_per_second"):
            values = sorted(row[key] for row in rows if key in row)
            if values:
                speeds[f"{name}/{key}"] = values[len(values) // 2]
    return speeds


def _mean_speed(found: dict[Point, Result]) -> float:
    return sum(r.tokens_per_second for r in found.values()) / len(found)


def _print(stage: ReportStage, context: Context, found: dict[Point, Result], results: dict[str, Any]) -> None:
    console = Console(highlight=False)
    table = Table(
        title=f"Accuracy on {stage.count} unseen problems a point, with 95% intervals",
        box=None, title_justify="left", show_header=False, pad_edge=False,
    )  # fmt: skip
    page = Report.model_validate(results["report"])
    for line in page.headline:
        cells = [f"{name}\n{s.mean:.3f} \\[{s.low:.3f}, {s.high:.3f}]" for name, s in line.values.items()]
        table.add_row(line.claim, *cells)
    console.print(table)
    for curve in page.budgets:
        if curve.model == AFTER:
            steps = [f"{'all' if p.thinking is None else p.thinking}: {p.accuracy.mean:.2f}" for p in curve.points]
            console.print(f"thinking tokens allowed, {curve.task}:  {'   '.join(steps)}")
    console.print(
        f"\n{results['seconds'] / 60:.1f} minutes in all. Report: {context.run / 'report.html'}", soft_wrap=True
    )
    console.print(f"Talk to it:  trivet chat {context.run / stage.final} --tools calculator", soft_wrap=True)
