"""`trivet eval`: a model on a task, at one or more thinking budgets."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from trivet.config import UserError
from trivet.engine.speculate import MTP, Draft, Drafter, NGram
from trivet.hub.checkpoint import load_any
from trivet.measure.evaluate import evaluate
from trivet.measure.results import Budget, Result
from trivet.messages import Sampling
from trivet.model import Transformer
from trivet.recipes.loading import Loading
from trivet.tasks import make_task

PROMPT_TOKENS = 4096  # of a problem, at most, where the model's context is longer
CACHE_BYTES = 4 * 10**9


def evaluate_directory(
    directory: Path, task_name: str, settings: list[str], budgets: list[Budget], tools: bool, count: int,
    sampling: Sampling, seed: int, as_json: bool, how: Loading,
) -> None:  # fmt: skip
    """Print one line a budget (or a JSON list). Problems are of the task's test split."""
    task = make_task({"name": task_name, **parse_settings(settings)})
    model, chat = how.load(directory, Console(stderr=True))
    slots = min(model.spec.context_length, PROMPT_TOKENS + sampling.max_tokens)
    row_bytes = model.spec.cache_bytes_per_token(model.embed.element_size()) * slots + model.spec.state_bytes(4)
    rows = max(1, min(512, CACHE_BYTES // row_bytes))
    results = []
    for budget in budgets:
        asked = Sampling(temperature=sampling.temperature, max_tokens=sampling.max_tokens, thinking=budget)
        results.append(
            evaluate(model, chat, task, count=count, sampling=asked, tools=tools, seed=seed, max_rows=rows, slots=slots)
        )
    if as_json:
        print(json.dumps([json.loads(r.model_dump_json(exclude={"samples"})) for r in results], indent=1))
    else:
        _print(task.name, results)


def drafter_of(text: str, model: Transformer, device: torch.device) -> Drafter:
    """`ngram:4`, `mtp:2` or `DIRECTORY:4` as a drafter that guesses so many tokens ahead. Raises UserError."""
    what, colon, number = text.rpartition(":")
    if not colon or not number.isdigit() or int(number) < 1:
        raise UserError(f"--guess {text!r} should read WHAT:TOKENS, for example ngram:4, mtp:2 or runs/small:4.")
    ahead = int(number)
    if what == "ngram":
        return NGram(ahead)
    return MTP(model, ahead) if what == "mtp" else Draft(load_any(Path(what), device).eval(), model, ahead)


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


def _print(name: str, results: list[Result]) -> None:
    table = Table(
        title=f"{name}, {results[0].questions} unseen problems, T = {results[0].temperature:g}",
        box=None,
        title_justify="left",
    )
    for column in (
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
    ):
        table.add_column(column, justify="right")
    for r in results:
        thinking = "unlimited" if r.thinking is None else str(r.thinking)
        table.add_row(
            thinking, f"{r.accuracy.mean:.3f}", f"[{r.accuracy.low:.3f}, {r.accuracy.high:.3f}]".replace("[", "\\["),
            *(f"{share:.0%}" for share in (r.thinks, r.calls_tool, r.budget_hit, r.truncated)), f"{r.mean_tokens:.1f}",
            str(sum(n for status, n in r.statuses.items() if status != "ok")), f"{r.tokens_per_second:,.0f}",
        )  # fmt: skip
    Console(highlight=False).print(table)
