"""`trivet eval`: a model on a task, at one or more thinking budgets."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from trivet.config import UserError
from trivet.measure.evaluate import evaluate
from trivet.measure.results import Budget, Result
from trivet.messages import Sampling
from trivet.recipes.loading import Loading, ready_policy
from trivet.tasks import make_task

PROMPT_TOKENS = 4096  # of a problem, at most, where the model's context is longer
CALIBRATED = 32  # texts for a low-rank cache
CACHE_BYTES = 4 * 10**9


def evaluate_directory(
    directory: Path, task_name: str, settings: list[str], budgets: list[Budget], tools: bool, count: int,
    sampling: Sampling, seed: int, as_json: bool, how: Loading, caches: str = "full",
) -> None:  # fmt: skip
    """Print one line a cache policy and budget (or a JSON list). Problems are of the task's test split.

    A low-rank cache is calibrated on the model's own answers to problems of the train split.
    """
    task = make_task({"name": task_name, **parse_settings(settings)})
    model, chat = how.load(directory, Console(stderr=True))
    slots = min(model.spec.context_length, PROMPT_TOKENS + sampling.max_tokens)
    results, size = [], model.embed.element_size()
    for name in caches.split(","):
        policy = ready_policy(name, model, chat, lambda i: task.problem("train", i).prompt, CALIBRATED, slots)
        row_bytes = policy.row_bytes(model.spec, slots, size)
        rows = max(1, min(512, CACHE_BYTES // row_bytes))
        for budget in budgets:
            asked = Sampling(temperature=sampling.temperature, max_tokens=sampling.max_tokens, thinking=budget)
            result = evaluate(
                model, chat, task, count=count, sampling=asked, tools=tools, seed=seed, max_rows=rows, slots=slots,
                policy=policy,
            )  # fmt: skip
            results.append((name, row_bytes, result))
    if as_json:
        told = [json.loads(r.model_dump_json(exclude={"samples"})) for _, _, r in results]
        print(
            json.dumps(
                [t | {"cache": n, "cache_bytes": b} for t, (n, b, _) in zip(told, results, strict=True)], indent=1
            )
        )
    else:
        _print(task.name, results, caches != "full", slots)


def parse_settings(settings: list[str]) -> dict[str, Any]:
    """`key=value` words as a task's settings; a value is TOML, a bare word is a string."""
    parsed: dict[str, Any] = {}
    for setting in settings:
        key, eq, text = setting.partition("=")
        if not eq or not key:
            raise UserError(f"--set {setting!r} should read KEY=VALUE, for example max_steps=12.")
        try:
            parsed[key] = tomllib.loads(f"v = {text}")["v"]
        except tomllib.TOMLDecodeError:
            parsed[key] = text
    return parsed


def _print(name: str, results: list[tuple[str, int, Result]], with_caches: bool, slots: int) -> None:
    first = results[0][2]
    table = Table(
        title=f"{name}, {first.questions} unseen problems, T = {first.temperature:g}"
        + (f"; caches of {slots:,} tokens" if with_caches else ""),
        box=None,
        title_justify="left",
    )
    columns = (
        "thinking",
        "accuracy",
        "95% interval",
        "thinks",
        "tool",
        "budget hit",
        "cut off",
        "tokens",
        "not graded",
        "tok/s",
    )
    shown = [0, 1, 2, 6, 7] if with_caches else list(range(len(columns)))  # a line holds no more
    for column in ("cache", "bytes") if with_caches else ():
        table.add_column(column, justify="right", no_wrap=True)
    for i in shown:
        table.add_column(columns[i], justify="right")
    for cache, row_bytes, r in results:
        cells = (
            "unlimited" if r.thinking is None else str(r.thinking), f"{r.accuracy.mean:.3f}",
            f"[{r.accuracy.low:.3f}, {r.accuracy.high:.3f}]".replace("[", "\\["),
            *(f"{share:.0%}" for share in (r.thinks, r.calls_tool, r.budget_hit, r.truncated)), f"{r.mean_tokens:.1f}",
            str(sum(n for status, n in r.statuses.items() if status != "ok")), f"{r.tokens_per_second:,.0f}",
        )  # fmt: skip
        table.add_row(*((cache, f"{row_bytes:,}") if with_caches else ()), *(cells[i] for i in shown))
    Console(highlight=False).print(table)
