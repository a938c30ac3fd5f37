"""Live progress of stages: one bar a stage with the figures that matter. Plain lines without a terminal."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from trivet.recipes.kinds.base import Progress as Report
from trivet.recipes.stages import Stage
from trivet.train.loop import RunConfig

LINE_EVERY = 10.0  # seconds between lines where there is no terminal


class Live:
    """`watch` opens a bar for a stage and returns what its metrics are to be fed to."""

    def __init__(self) -> None:
        self.console = Console(file=sys.stderr, highlight=False)
        columns = (
            TextColumn("[bold]{task.description:10s}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[figures]}"),
        )
        self.bars = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=self.console)
        self.printed: dict[str, float] = {}

    def __enter__(self) -> Live:
        if self.console.is_terminal:
            self.bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.console.is_terminal:
            self.bars.stop()

    def say(self, text: str) -> None:
        self.console.print(text, style="dim", markup=False)

    def watch(self, name: str, stage: Stage) -> Report:
        bar = self.bars.add_task(name, total=None, figures="starting")

        def show(metrics: dict[str, Any]) -> None:
            figures = _figures(metrics)
            total = metrics.get("steps") or _steps(stage)
            self.bars.update(bar, completed=metrics["step"], total=total, figures=figures)
            now = time.monotonic()
            last = total is not None and metrics["step"] >= total
            if not self.console.is_terminal and (last or now - self.printed.get(name, 0.0) >= LINE_EVERY):
                self.printed[name] = now
                self.console.print(f"{name:10s} {metrics['step']:6d}/{total or '?'}  {figures}", markup=False)

        return show


def _steps(stage: Stage) -> int | None:
    return next((settings.steps for _, settings in stage if isinstance(settings, RunConfig)), None)


# metric -> how a person reads it; the order is the order shown, absent ones are skipped
SHOWN = {
    "loss": "loss {:.3f}",
    "reward": "reward {:.3f}",
    "no_spread": "no spread {:.0%}",
    "accuracy": "accuracy {:.3f}",
    "kl": "kl {:.4f}",
    "kept": "{:,} kept",
    "point": "{}",
    "tokens_per_second": "{:,.0f} tok/s",
    "mfu": "mfu {:.0%}",
    "expert_load": "load {:.1f}x",
}


def _figures(metrics: dict[str, Any]) -> str:
    return "  ".join(form.format(metrics[key]) for key, form in SHOWN.items() if key in metrics)
