"""What a plan looks like: tables in the terminal, and three plots of the same numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trivet.config import UserError
from trivet.hub import Described, catalog, known_names
from trivet.measure.plan import (
    Question,
    find_device,
    find_model,
    find_training,
    price,
    sequence_bytes,
    step_seconds,
    training_setting,
)
from trivet.measure.trial import try_out

Rows = list[tuple[str, str, str]]
SIZES: Rows = [
    ("total_params", "parameters", "{:,}"),
    ("mtp_params", "… of prediction modules, not counted above", "{:,}"),
    ("active_params", "active a token", "{:,}"),
    ("weight_bytes", "weights, bf16", "bytes"),
    ("cache_bytes_per_token", "cache a token, bf16 bytes", "{:,}"),
    ("state_bytes", "recurrent state, fp32", "bytes"),
    ("cache_bytes", "a sequence of {context:,}", "bytes"),
    ("flops_per_token", "FLOPs a token at {context:,}", "flops"),
    ("generation_flops", "FLOPs to write {generated_tokens:,}", "flops"),
    ("generation_flops_absorbed", "… MLA absorbed, as decoding does", "flops"),
    ("training_flops_per_token", "training FLOPs a token, rows of {context:,}", "flops"),
]
TRAINING: Rows = [
    ("step", "training, a device: rows × length", "{}"),
    ("weights", "… weights, fp32", "bytes"),
    ("gradients", "… gradients, fp32", "bytes"),
    ("optimizer", "… Muon and AdamW, fp32", "bytes"),
    ("activations", "… activations", "bytes"),
    ("host", "… in host memory", "bytes"),
    ("peak", "… at its peak", "bytes"),
    ("peak_in", "… which is in the", "{}"),
]
LIMITS: Rows = [
    ("devices", "devices", "{:,}"),
    ("training_devices", "devices to train on (FSDP)", "{:,}"),
    ("largest_batch", "sequences that fit", "{:,}"),
    ("single_tokens_per_second", "one stream, tok/s", "{:,.0f}"),
    ("batch", "batch", "{:,}"),
    ("batched_tokens_per_second", "batched, tok/s", "{:,.0f}"),
    ("batched_limit", "limited by", "{}"),
    ("prefill_tokens_per_second", "prefill, tok/s", "{:,.0f}"),
    ("cost_per_million_decoded", "1M decoded", "{:,.2f}"),
    ("cost_per_million_prefilled", "1M prefilled", "{:,.2f}"),
    ("training_device_hours", "training, hours", "{:,.0f}"),
    ("training_cost", "training, cost", "{:,.0f}"),
]
SHARDS = {"accumulate": "microbatches", "shards": "shards", "expert_shards": "expert shards"}
SPANS = {"train": "training step", "prefill": "reading the prompts", "decode": "one token a row"}
UNITS = {"bytes": "B", "flops": "FLOP"}


def plan_models(names: list[str], ask: Question, as_json: bool, plot: Path | None) -> None:
    """Print tables (or JSON), and write the plots where asked for."""
    for device in ask.hardware:
        find_device(device)  # a wrong name is said before anything is printed
    models = {name: find_model(name) for name in names}
    rows = [price(Path(name).name or name, model, ask, find_training(name)) for name, model in models.items()]
    if plot is not None:
        draw(models, ask, plot)
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table("", *(row["name"] for row in rows), box=None)
    for key, label, how in SIZES:
        if key == "mtp_params" and not any(row[key] for row in rows):
            continue
        if key == "generation_flops_absorbed" and all(row[key] == row["generation_flops"] for row in rows):
            continue
        table.add_row(label.format(**rows[0]), *(show(row[key], how) for row in rows))
    for key, label, how in TRAINING:
        if key == "host" and not any(row["training"][key] for row in rows):
            continue
        table.add_row(label, *(show((row["training"] | {"step": in_words(row["training"])})[key], how) for row in rows))
    console.print(table)
    if ask.hardware:
        found = [(row["name"], limits) for row in rows for limits in row["hardware"]]
        table = Table("", *(f"{name}\n{limits['device']}" for name, limits in found), box=None)
        for key, label, how in LIMITS:
            if any(key in limits for _, limits in found):
                table.add_row(label, *(show(limits.get(key), how) for _, limits in found))
        console.print()
        console.print(table)
        console.print(
            f"Limits by roofline at {ask.context:,} tokens of context, bf16, no communication: no kernel is faster.",
            style="dim", highlight=False,
        )  # fmt: skip
        if any(limits["training_devices"] is None for _, limits in found):
            console.print(
                "No number of devices to train on: a device's activations do not fit, or its share of what --shards "
                "divides, or a layer's experts when they are gathered; take fewer --rows, --recompute, --expert-shards or more --shards.",
                style="dim", highlight=False,
            )  # fmt: skip
    for row in rows:
        for note in row["notes"]:
            console.print(f"{row['name']}: {note}", style="dim", highlight=False)


def in_words(step: dict[str, Any]) -> str:
    """A training step as a person says it: 4 × 512, bf16, recomputed, 8 shards."""
    shards = [f"{step[key]} {words}" for key, words in SHARDS.items() if step.get(key, 1) > 1]
    moved = [f"{step['offload']} offloaded"] if step["offload"] != "none" else []
    words = [step["precision"], *["recomputed"] * step["recompute"], *moved, *shards]
    return ", ".join([f"{step['rows']:,} × {step['length']:,}", *words])


def measure_models(names: list[str], ask: Question, device: str, as_json: bool) -> None:
    """Run each model, or what is left of it, on this machine; print what was predicted beside what was measured."""
    from rich.console import Console
    from rich.table import Table

    models = {name: find_model(name) for name in names}
    console, rows = Console(), []
    for name, model in models.items():
        setting = training_setting(ask, find_training(name))
        label = Path(name).name or name
        with Console(stderr=True).status(f"measuring {label}: about a minute"):
            row = try_out(label, model.spec, setting, device)
        row["notes"] = list(model.notes)
        rows.append(row)
        if as_json:
            continue
        said = f"{row['params']:,} parameters, {in_words(row['setting'])}"
        table = Table(f"{row['name']} on {row['device']}", "predicted", "measured", "ratio", box=None)
        for kind, pair in row["memory"].items():
            table.add_row(kind, *(show(pair[k], "bytes") for k in ("predicted", "measured")), f"{pair['ratio']:.2f}")
        for kind, pair in row["seconds"].items():
            numbers = (f"{pair[k]:.3g} s" for k in ("predicted", "measured"))
            table.add_row(SPANS[kind], *numbers, f"{pair['ratio']:.1f}")
        console.print(table)
        cut = "Scaled down to fit: " + "; ".join(row["changes"]) + "." if row["changes"] else "The whole model."
        notes = [
            *row["notes"],
            said + ". " + cut,
            f"This machine: {show(row['flops'], 'flops')}/s in a large product, {show(row['bytes_per_second'], 'bytes')}/s read.",
        ]
        if "kept_bytes" in row:
            notes.append(
                f"Memory is what lives; `trivet train` on a CPU keeps what it freed: {show(row['kept_bytes'], 'bytes')}."
            )
        for note in [*notes, *row["notes"]]:
            console.print(note, style="dim", highlight=False)
    if as_json:
        print(json.dumps(rows, indent=1))


def list_models() -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("name", "on the hub", "parameters", "as published", box=None)
    for name in known_names():
        entry = catalog()[name]
        published = entry.get("published", {})
        said = " / ".join(str(v) for v in published.values())
        spec = find_model(name).spec
        table.add_row(name, entry["hf"], f"{spec.main_params():,}", said)
    Console().print(table)


def show(value: Any, how: str) -> str:
    if value is None:
        return "-"
    if how not in UNITS:
        return how.format(value)
    number, prefixes = float(value), iter(("k", "M", "G", "T", "P", "E", "Z", "Y"))
    prefix = ""
    while abs(number) >= 1000:
        number, prefix = number / 1000, next(prefixes)
    return f"{number:.3g} {prefix}{UNITS[how]}"


def draw(models: dict[str, Described], ask: Question, path: Path) -> None:
    """Cache against context, FLOPs against generation length, decode limit against batch (first hardware)."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("Plots need matplotlib: pip install 'trivet[report]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    device_name = ask.hardware[0] if ask.hardware else "h100"
    device = find_device(device_name)
    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(14, 4.4), layout="constrained")
    lengths = [2**i for i in range(10, 21)]
    batches = [2**i for i in range(11)]
    for name, model in models.items():
        spec, label = model.spec, Path(name).name or name
        left.plot(lengths, [sequence_bytes(spec, n) / 1e9 for n in lengths], label=label)
        (line,) = middle.plot(lengths, [spec.generation_flops(n) for n in lengths], label=label)
        absorbed = [spec.generation_flops(n, absorbed=True) for n in lengths]
        if absorbed[-1] != spec.generation_flops(lengths[-1]):
            middle.plot(lengths, absorbed, color=line.get_color(), linestyle=":", label=f"{label}, absorbed")
        speeds = [b / max(step_seconds(spec, device, 1, b, ask.context)) for b in batches]
        right.plot(batches, speeds, label=label)
    left.set(xlabel="tokens of context", ylabel="GB a sequence", title="Cache")
    middle.set(xlabel="tokens generated", ylabel="FLOPs", title="Work")
    right.set(
        xlabel="sequences in a step", ylabel="tokens/s a device",
        title=f"Decode limit, {device.title}, {ask.context:,} tokens",
    )  # fmt: skip
    for axes in (left, middle, right):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as e:
        raise UserError(f"The plot can't be written to {path}: {e}") from None
    pyplot.close(figure)
