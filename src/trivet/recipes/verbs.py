"""`trivet eval`: a model on a task, at one or more thinking budgets. `trivet export`: a model back in its family's format."""

from __future__ import annotations

import json
import shutil
import tomllib
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from trivet.config import UserError
from trivet.disk import atomic_dir
from trivet.hub import read_config_file
from trivet.hub.adapter import base_of, family_of, is_adapter, save_adapter
from trivet.hub.checkpoint import load_any, load_pair, save_checkpoint
from trivet.measure.evaluate import evaluate
from trivet.measure.results import Budget, Result
from trivet.messages import Sampling
from trivet.model import Transformer
from trivet.model.lora import fingerprint, merge
from trivet.tasks import make_task

PROMPT_TOKENS = 4096  # of a problem, at most, where the model's context is longer
CACHE_BYTES = 4 * 10**9
COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "generation_config.json",
)


def export(directory: Path, like: Path | None, out: Path, dtype: str | None, adapter: bool) -> None:
    """Write a model in the format of the checkpoint that it came from, with that one's tokenizer files.

    An adapter is merged into its base, or written as it is, for `like` as its base.
    """
    adapted = is_adapter(directory)
    if out.exists():
        raise UserError(f"{out} exists already; give another --out or remove it.")
    if adapter and not adapted:
        raise UserError(f"{directory} holds a whole model, no adapter: leave --adapter out.")
    like = like or base_of(directory)
    if family_of(like) == "trivet":
        raise UserError(f"{like} has no family's format: give --like, the checkpoint that it came from.")
    described = read_config_file(like / "config.json").spec
    kind = {None: torch.float32 if adapter else None, "fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    model = load_any(directory, dtype=kind)
    ours, theirs = (spec.model_dump(exclude={"mtp"}) for spec in (model.spec, described))
    different = [key for key in ours if ours[key] != theirs[key]]
    if different:
        raise UserError(f"{directory} is no model of {like}'s shape: they differ in {', '.join(different)}.")
    if adapter:
        _export_adapter(model, directory, like, out)
        return
    merge(model)
    config = json.loads((like / "config.json").read_text()) | {"dtype": str(model.embed.dtype).removeprefix("torch.")}
    for key in ("torch_dtype", "quantization_config"):
        config.pop(key, None)
    if "num_nextn_predict_layers" in config:
        config["num_nextn_predict_layers"] = model.spec.mtp
    with atomic_dir(out) as aside:
        save_checkpoint(model, aside, config)
        for name in COPIED:
            if (like / name).is_file():
                shutil.copy(like / name, aside / name)


def _export_adapter(model: Transformer, directory: Path, like: Path, out: Path) -> None:
    if like.resolve() != base_of(directory).resolve() and fingerprint(load_any(like)) != fingerprint(model):
        raise UserError(
            f"{directory} was trained on other weights than {like} holds, so its adapter is worth nothing there: "
            "leave --adapter out to write the merged model."
        )
    with atomic_dir(out) as aside:
        save_adapter(model, aside, like, family_of(like))


def evaluate_directory(
    directory: Path, task_name: str, settings: list[str], budgets: list[Budget], tools: bool, count: int,
    sampling: Sampling, seed: int, as_json: bool, device: torch.device,
) -> None:  # fmt: skip
    """Print one line a budget (or a JSON list). Problems are of the task's test split."""
    task = make_task({"name": task_name, **parse_settings(settings)})
    model, chat = load_pair(directory, device)
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
