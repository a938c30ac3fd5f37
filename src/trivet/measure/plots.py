"""The report's figures, as SVG that takes its colours and its font from the page.

matplotlib draws with placeholder colours, which become CSS variables here, so that one picture is
readable on light and on dark ground. Series differ by marker and line style too (Okabe-Ito colours).
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

from trivet.config import UserError
from trivet.measure.results import Budget, Curve, ExpertLoad, Result, SamplingBars, Share, ToolBars

INK, MUTED, GRID = "#010203", "#040506", "#070809"  # placeholders
SERIES = ("#0a0b01", "#0a0b02", "#0a0b03", "#0a0b04", "#0a0b05", "#0a0b06")
MARKERS, LINES = ("o", "s", "D", "^", "v", "P"), ("-", "--", "-.", ":", (0, (5, 1)), (0, (1, 1)))
VARIABLES = {INK: "var(--ink)", MUTED: "var(--muted)", GRID: "var(--grid)"} | {
    color: f"var(--series-{i})" for i, color in enumerate(SERIES)
}
WIDTH = 8.6  # inches at 100 units an inch: the column is 900 px less its padding

Rows = Sequence[Mapping[str, Any]]  # lines of a metrics.jsonl


def loss_curve(stages: Mapping[str, Rows]) -> str | None:
    """Training loss over optimizer steps of every stage that imitates; a policy's loss says nothing of the kind."""
    series = {name: _pick(rows, "loss") for name, rows in stages.items() if not _pick(rows, "reward")}
    series = {name: points for name, points in series.items() if len(points) > 1}
    if not series:
        return None
    figure, axes = _figure(1, 3.0)
    for i, (name, points) in enumerate(series.items()):
        _line(axes[0], points, i, name)
    _finish(axes[0], "optimizer step", "loss (nats per token)")
    if min(y for points in series.values() for _, y in points) > 0:
        axes[0].set_yscale("log", subs=(2, 5))
        for which in (axes[0].yaxis.set_major_formatter, axes[0].yaxis.set_minor_formatter):
            which("{x:g}")  # 0.2, not 2 x 10^-1
        axes[0].tick_params(which="minor", colors=MUTED, labelcolor=INK, length=3)
        axes[0].grid(axis="y", which="minor", color=GRID, linewidth=0.8)
    return _svg(figure)


def reward_curve(name: str, rows: Rows) -> str | None:
    """Reward of one RL stage, in all and by task, and what it changes besides."""
    reward = _pick(rows, "reward")
    if len(reward) < 2:
        return None
    figure, axes = _figure(2, 3.0)
    tasks = sorted({key for row in rows for key in row if key.startswith("reward/")})
    if len(tasks) != 1:
        _line(axes[0], reward, 0, "all tasks")
    for i, key in enumerate(tasks, 1):
        _line(axes[0], _pick(rows, key), i, key.removeprefix("reward/"))
    _finish(axes[0], f"step of {name}", "mean reward of a batch")
    shares = {
        "thinks": "thinks",
        "calls_tool": "calls a tool",
        "budget_hit": "budget spent",
        "no_spread": "group agrees",
    }
    for i, (key, label) in enumerate(shares.items()):
        points = _pick(rows, key)
        if any(y for _, y in points):
            _line(axes[1], points, i, label)
    _finish(axes[1], f"step of {name}", "share of answers or groups", unit=True)
    return _svg(figure)


def learning_curves(stages: Mapping[str, Rows], keys: Sequence[str]) -> str | None:
    """A panel for each of these metrics over steps, one line a stage."""
    found = {key: {name: _pick(rows, key) for name, rows in stages.items()} for key in keys}
    found = {key: lines for key, lines in found.items() if any(len(points) > 1 for points in lines.values())}
    if not found:
        return None
    figure, axes = _figure(len(found), 3.0)
    for axis, (key, lines) in zip(axes, found.items(), strict=True):
        for i, (name, points) in enumerate(lines.items()):
            if points:
                _line(axis, points, i, name)
        _finish(axis, "RL step", key.replace("_", " "))
    return _svg(figure)


def budget_curve(task: str, curves: Sequence[Curve]) -> str:
    """Accuracy against the thinking budget, one line a model, 95% intervals."""
    figure, axes = _figure(1, 3.3)
    places = _places([point.thinking for curve in curves for point in curve.points])
    for i, curve in enumerate(curves):
        shift = 0.06 * (i - (len(curves) - 1) / 2)  # so that intervals do not hide each other
        points = sorted(curve.points, key=lambda p: places[p.thinking])
        xs = [places[p.thinking] + shift for p in points]
        _errors(axes[0], xs, [p.accuracy for p in points], i, curve.model)
    axes[0].set_xticks(list(places.values()), [_budget_label(b) for b in places])
    _finish(axes[0], "thinking budget (tokens)", f"accuracy on {task}", unit=True)
    return _svg(figure)


def tool_bars(pairs: Sequence[ToolBars]) -> str:
    groups = [(_two(p.task, p.model), [p.without.accuracy, p.with_tool.accuracy]) for p in pairs]
    return _bars(groups, ["without the tool", "with the tool"])


def sampling_bars(pairs: Sequence[SamplingBars]) -> str:
    groups = [(_two(p.task, p.model), [p.greedy.accuracy, p.sampled.accuracy]) for p in pairs]
    return _bars(groups, ["greedy", "T = 1"])


def expert_bars(load: ExpertLoad) -> str:
    """Load of each expert relative to an even share, one panel a layer."""
    layers = len(load.shares)
    figure, axes = _figure(min(layers, 4), 2.0 * -(-layers // 4), rows=-(-layers // 4), sharey=True)
    for layer, (axis, shares) in enumerate(zip(axes, load.shares, strict=False)):
        even = sum(shares) / len(shares)
        axis.bar(range(len(shares)), [s / even for s in shares], color=SERIES[0], width=0.72)
        axis.axhline(1.0, color=INK, linewidth=0.9, linestyle="--")
        axis.set_title(f"layer {layer}", fontsize=9, color=MUTED, loc="left")
        _finish(axis, "expert", "load / even share" if layer % 4 == 0 else "", legend=False)
        step = max(1, len(shares) // 8)
        axis.set_xticks(range(0, len(shares), step))
        axis.set_ylim(bottom=0)
    for axis in axes[layers:]:
        axis.set_visible(False)
    return _svg(figure)


# ------------------------------------------------------------------------------------------- drawing
def _figure(columns: int, height: float, rows: int = 1, sharey: bool = False) -> tuple[Any, list[Any]]:
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("A report needs matplotlib: pip install 'trivet[report]'.") from None
    mpl.rcParams.update(
        {"svg.fonttype": "none", "svg.hashsalt": "trivet", "font.family": "sans-serif", "font.size": 9.5}
    )
    figure = Figure(figsize=(WIDTH, height), dpi=100, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharey=sharey)
    return figure, list(axes.flat)


def _line(axis: Any, points: Sequence[tuple[float, float]], index: int, label: str) -> None:
    i = index % len(SERIES)
    xs, ys = zip(*points, strict=True) if points else ((), ())
    axis.plot(xs, ys, color=SERIES[i], linestyle=LINES[i], linewidth=1.7, label=label)


def _errors(axis: Any, xs: Sequence[float], shares: Sequence[Share], index: int, label: str) -> None:
    i = index % len(SERIES)
    below, above = [s.mean - s.low for s in shares], [s.high - s.mean for s in shares]
    axis.errorbar(
        xs, [s.mean for s in shares], yerr=[below, above], color=SERIES[i], linestyle=LINES[i], marker=MARKERS[i],
        markersize=5, linewidth=1.5, elinewidth=1.1, capsize=2.5, label=label,
    )  # fmt: skip


def _bars(groups: Sequence[tuple[str, Sequence[Share]]], names: Sequence[str]) -> str:
    """Groups of bars with intervals; the number stands above its interval."""
    figure, (axis,) = _figure(1, 3.0)
    width = 0.6 / len(names)
    for i, name in enumerate(names):
        for g, (_, shares) in enumerate(groups):
            share, x = shares[i], g + (i - (len(names) - 1) / 2) * width
            axis.bar(x, share.mean, width * 0.92, color=SERIES[i], label=name if g == 0 else None, alpha=0.9)
            error = [[share.mean - share.low], [share.high - share.mean]]
            axis.errorbar(x, share.mean, yerr=error, color=INK, elinewidth=1.1, capsize=2.5)
            axis.text(x, share.high + 0.02, f"{share.mean:.2f}", ha="center", va="bottom", color=INK, fontsize=8.5)
    axis.set_xticks(range(len(groups)), [label for label, _ in groups])
    axis.set_xlim(-0.6, len(groups) - 0.4)
    _finish(axis, "", "accuracy", unit=True)
    axis.set_ylim(0, 1.12)
    axis.grid(axis="x", visible=False)
    return _svg(figure)


def _finish(axis: Any, x: str, y: str, unit: bool = False, legend: bool = True) -> None:
    axis.set_xlabel(x, color=INK)
    axis.set_ylabel(y, color=INK)
    axis.tick_params(colors=MUTED, labelcolor=INK, length=3)
    for side, spine in axis.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(MUTED)
    axis.grid(axis="y", color=GRID, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.margins(x=0.02)
    if unit:
        axis.set_ylim(-0.02, 1.02)
        axis.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    if legend and len(axis.get_legend_handles_labels()[1]) > 0:
        columns = 3 if len(axis.figure.axes) == 1 else 2
        axis.legend(
            loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, frameon=False, labelcolor=INK, fontsize=9,
            handlelength=2.4, borderaxespad=0.2, columnspacing=1.4,
        )  # fmt: skip


_count = 0


def _svg(figure: Any) -> str:
    """The figure as an <svg> element whose ids are its own and whose colours are the page's."""
    global _count
    _count += 1
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return recolor(text[text.index("<svg") :], f"f{_count}-")


def recolor(svg: str, prefix: str) -> str:
    for color, variable in VARIABLES.items():
        svg = svg.replace(color, variable)
    svg = re.sub(r'\bid="', f'id="{prefix}', svg)
    svg = svg.replace("url(#", f"url(#{prefix}").replace('href="#', f'href="#{prefix}')
    return re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)


def _pick(rows: Rows, key: str) -> list[tuple[float, float]]:
    return [(row["step"], row[key]) for row in rows if row.get(key) is not None]


def _places(budgets: Sequence[Budget]) -> dict[Budget, float]:
    """Where each budget stands: to scale, with off before and unlimited after them; evenly spaced
    where a scale would crowd the small ones."""
    sizes = sorted({b for b in budgets if isinstance(b, int)})
    ends: list[Budget] = [b for b in ("off", None) if b in budgets]
    order: list[Budget] = [*(b for b in ends if b == "off"), *sizes, *(b for b in ends if b is None)]
    positive = [b for b in sizes if b > 0]
    if not positive or sizes[-1] > 20 * positive[0]:
        return {b: float(i) for i, b in enumerate(order)}
    gap = sizes[-1] / max(len(sizes) - 1, 1)
    places: dict[Budget, float] = {b: b / gap for b in sizes}
    first, last = places[sizes[0]], places[sizes[-1]]
    return {b: first - 1 if b == "off" else last + 1 if b is None else places[b] for b in order}


def _budget_label(budget: Budget) -> str:
    return "off" if budget == "off" else "unlimited" if budget is None else str(budget)


def _two(task: str, model: str) -> str:
    return f"{task}\n{model}"


def by_task(curves: Sequence[Curve]) -> dict[str, list[Curve]]:
    groups: dict[str, list[Curve]] = {}
    for curve in curves:
        groups.setdefault(curve.task, []).append(curve)
    return groups


def describe(result: Result) -> str:
    """How a point was sampled, in a few words."""
    how = "greedy" if result.temperature == 0 else f"T = {result.temperature:g}"
    return f"{how}, budget {_budget_label(result.thinking)}"
