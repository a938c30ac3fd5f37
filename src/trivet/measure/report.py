"""report.html: one file with every number, curve and transcript of a run, and how to repeat it.

It loads nothing from anywhere. What it says comes from a `Report` (results.json) and the stages'
metrics.jsonl; it computes no result of its own.
"""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from trivet.config import UserError, explain
from trivet.disk import Journal, write_atomic
from trivet.measure import plots
from trivet.measure.results import Report, Share

PACKAGES = ("trivet", "torch", "numpy", "tokenizers", "pydantic", "safetensors")


def write_report(report: Report, stages: Mapping[str, Path], out: Path) -> Path:
    """Write out/results.json and out/report.html. `stages`: name -> its directory, in order."""
    metrics = {name: Journal(path / "metrics.jsonl").read() for name, path in stages.items()}
    write_atomic(out / "results.json", report.model_dump_json(indent=1) + "\n")
    write_atomic(out / "report.html", render(report, metrics))
    return out / "report.html"


def read_results(path: Path) -> Report:
    """results.json back as a Report. Raises UserError where it is missing or of another version."""
    from pydantic import ValidationError

    try:
        return Report.model_validate_json(path.read_text())
    except OSError as e:
        raise UserError(f"No results at {path}: {e.strerror}.") from None
    except ValidationError as e:
        raise UserError(f"{path} is no report of this version: {explain(e, Report)}") from None


def render(report: Report, metrics: Mapping[str, plots.Rows]) -> str:
    """The page. Everything in it is escaped, model output above all; only our own SVG is not."""
    from markupsafe import Markup

    curves = [plots.reward_curve(name, rows) for name, rows in metrics.items()]
    figures: dict[str, Any] = {
        "loss": plots.loss_curve(metrics),
        "rewards": [svg for svg in curves if svg],
        "budgets": [plots.budget_curve(task, group) for task, group in plots.by_task(report.budgets).items()],
        "tools": plots.tool_bars(report.tools) if report.tools else None,
        "sampling": plots.sampling_bars(report.sampling) if report.sampling else None,
        "experts": [(load.model, plots.expert_bars(load)) for load in report.experts],
    }
    trusted = {key: _trust(value, Markup) for key, value in figures.items()}
    return (
        pages()
        .get_template("report.html.jinja")
        .render(r=report, figures=trusted, describe=plots.describe, counts=_counts(report))
    )


def pages() -> Any:
    """The jinja environment of our pages: everything is escaped, and nothing may be missing."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("trivet.measure", "."), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"share": share, "interval": interval, "ends": ends, "number": number, "duration": duration}
    return environment


def about(seed: int, device: str) -> dict[str, str]:
    """Machine, versions, seed and commit: what a reader needs to repeat the run."""
    facts = {"seed": str(seed), "device": device, "machine": _machine(), "python": platform.python_version()}
    for package in PACKAGES:
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = "not installed as a package"
    facts["commit"] = _commit()
    return facts


# ------------------------------------------------------------------------------------------- filters
def share(value: Share) -> str:
    return f"{value.mean:.3f}"


def interval(value: Share) -> str:
    return f"{value.low:.3f} to {value.high:.3f}, n = {value.count:,}"


def ends(value: Share) -> str:
    return f"{value.low:.2f} to {value.high:.2f}"


def number(value: float | None) -> str:
    if value is None:
        return "\u2013"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.3f}" if abs(value) < 100 else f"{value:,.0f}"


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


# ------------------------------------------------------------------------------------------- helpers
def _trust(value: Any, markup: Any) -> Any:
    if isinstance(value, str):
        return markup(value)
    if isinstance(value, list):
        return [_trust(v, markup) for v in value]
    if isinstance(value, tuple):
        name, svg = value  # (model, svg): the name is data, and stays escaped
        return name, markup(svg)
    return value


def _counts(report: Report) -> list[tuple[str, Any]]:
    """Every point that was measured, for the table of what was censored."""
    found = [(f"{c.task}, {c.model}", p) for c in report.budgets for p in c.points]
    for bars in report.tools:
        found += [(f"{bars.task}, {bars.model}, with tool", bars.with_tool)]
        found += [(f"{bars.task}, {bars.model}, no tool", bars.without)]
    for pair in report.sampling:
        found += [(f"{pair.task}, {pair.model}", pair.greedy), (f"{pair.task}, {pair.model}", pair.sampled)]
    return found


def _machine() -> str:
    name = platform.processor() or platform.machine()
    cpu = Path("/proc/cpuinfo")
    if cpu.is_file():
        lines = [line for line in cpu.read_text().splitlines() if line.startswith("model name")]
        name = lines[0].partition(":")[2].strip() if lines else name
    return f"{name}, {os.cpu_count()} cores, {platform.system()} {platform.release()}"


def _commit() -> str:
    """The commit of the code that runs, with a mark where it was changed since."""
    here = Path(__file__).parent

    def git(*args: str) -> str:
        done = subprocess.run(["git", "-C", str(here), *args], check=True, capture_output=True, text=True, timeout=10)
        return done.stdout.strip()

    try:
        changed = " (with uncommitted changes)" if git("status", "--porcelain", "--untracked-files=no") else ""
        return git("rev-parse", "--short=12", "HEAD") + changed
    except (OSError, subprocess.SubprocessError):
        return "unknown: not run from a git checkout"
