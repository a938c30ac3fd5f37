"""A model priced on paper, from its spec alone: no weights read, no torch imported.

Sizes and FLOPs are exact counts. What a device can do is a roofline: a step of decoding must read the
weights that its batch meets and every sequence's cache, and must compute its products, whichever takes
longer. Real kernels reach a part of that. What training holds: `memory.py`. Left out: communication,
quantised weights.
"""

from __future__ import annotations

import json
import math
import tomllib
from dataclasses import replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from trivet.config import UserError, nearest, read_toml, validate
from trivet.hub import Described, known_model, known_names, read_config_file
from trivet.hub.base import base_of, is_adapter
from trivet.measure.activations import Setting
from trivet.measure.memory import training_memory
from trivet.spec import Frozen, ModelSpec

BF16, FP32 = 2, 4
MOST_ROWS = 256  # of a step, where nobody says how many
USABLE = 0.9  # of a device's memory: the rest is for the runtime, fragments and, in serving, activations
MOST_DEVICES = 2**16


class Question(Frozen):
    """What to price: the command line's options."""

    context: int = Field(default=4096, gt=0)
    generate: int = Field(default=65_536, gt=0)
    hardware: tuple[str, ...] = ()
    batch: int | None = Field(default=None, gt=0)
    rows: int | None = Field(default=None, gt=0)
    length: int | None = Field(default=None, gt=0)
    precision: Literal["fp32", "bf16"] | None = None
    recompute: bool | None = None
    offload: Literal["none", "optimizer", "gradients"] | None = None
    shards: int | None = Field(default=None, gt=0)
    expert_shards: int | None = Field(default=None, gt=0)
    tokens: float | None = Field(default=None, gt=0)
    mfu: float = Field(default=0.4, gt=0, le=1)
    price: float | None = Field(default=None, gt=0)


class Device(Frozen):
    title: str
    flops: float  # bf16, dense
    bytes_per_second: float
    memory: float
    joins: bool = True  # several can share a model


@cache
def devices() -> dict[str, Device]:
    table = tomllib.loads(files("trivet.measure").joinpath("hardware.toml").read_text())
    return {name: Device(**values) for name, values in table.items()}


def find_device(name: str) -> Device:
    if name.lower() not in devices():
        known = devices()
        raise UserError(f"No hardware {name!r}; there are {', '.join(known)}.{nearest(name.lower(), known)}")
    return devices()[name.lower()]


# --------------------------------------------------------------------------------------------- price
def price(name: str, model: Described, ask: Question, train: dict[str, Any] | None = None) -> dict[str, Any]:
    """What one model costs. Bytes are of bf16 weights and caches and fp32 recurrent states.

    train: the run's own `[train]`, where there is one; what is asked for goes before it.
    """
    spec, setting = model.spec, training_setting(ask, train)
    try:
        memory = training_memory(spec, setting)
    except UserError as e:
        raise UserError(f"{name}: {e}") from None
    row: dict[str, Any] = {
        "name": name,
        "context": ask.context,
        "total_params": spec.main_params(),
        "mtp_params": spec.mtp_params(),
        "active_params": spec.active_params(),
        "weight_bytes": BF16 * spec.main_params(),
        "cache_bytes_per_token": spec.cache_bytes_per_token(BF16),
        "state_bytes": spec.state_bytes(FP32),
        "cache_bytes": sequence_bytes(spec, ask.context),
        "flops_per_token": spec.flops_per_token(ask.context),
        "generated_tokens": ask.generate,
        "generation_flops": spec.generation_flops(ask.generate),
        "generation_flops_absorbed": spec.generation_flops(ask.generate, absorbed=True),
        "training_flops_per_token": spec.training_flops_per_token(ask.context),
        "training": setting.model_dump(exclude={"cpu"}) | memory.row(),
        "notes": list(model.notes),
    }
    if ask.context > spec.context_length:
        row["notes"].append(f"{ask.context:,} tokens are more than the {spec.context_length:,} it is meant for")
    row["hardware"] = [on_device(spec, device, ask, setting) for device in ask.hardware]
    return row


def sequence_bytes(spec: ModelSpec, context: int) -> int:
    return spec.cache_bytes_per_token(BF16) * context + spec.state_bytes(FP32)


def training_setting(ask: Question, train: dict[str, Any] | None = None) -> Setting:
    """How a step is made: as asked, else as the run says, else one row as long as the context, in bf16."""
    run = {"length": ask.context} if train is None else {"precision": "fp32"} | train  # the trainer's own default
    given = ask.model_dump(include=set(Setting.model_fields), exclude_none=True)
    mine = {key: run[key] for key in Setting.model_fields if run.get(key)}  # shards = 0: as many as there are processes
    setting = Setting(**{**mine, **given})
    devices = setting.shards * setting.expert_shards
    if train is None or devices == 1 or "rows" in given:
        return setting
    turns = math.gcd(setting.accumulate, devices)  # a run's rows are those of all processes (train/data.py)
    rows = max(1, setting.rows * turns // devices)
    return setting.model_copy(update={"rows": rows, "accumulate": setting.accumulate // turns})


def training_devices(spec: ModelSpec, device: Device, ask: Question, setting: Setting) -> int | None:
    """How many devices, each with its rows, share the training state by FSDP until it fits. None: no number does."""
    shards = ask.shards or 1
    while shards * setting.expert_shards <= MOST_DEVICES:
        tried = setting.model_copy(update={"shards": shards, "cpu": not device.joins})
        if training_memory(spec, tried).peak <= USABLE * device.memory:
            return shards * setting.expert_shards
        if ask.shards is not None or not device.joins:
            return None
        shards *= 2
    return None


def step_seconds(spec: ModelSpec, device: Device, count: int, batch: int, context: int) -> tuple[float, float]:
    """Seconds to read and seconds to compute for one step of decoding on `count` devices."""
    looked_up = 0 if spec.tie_embeddings else spec.vocab_size * spec.d_model  # the input table is not read whole
    weights = BF16 * (spec.touched_params(batch) - looked_up)
    caches = batch * (sequence_bytes(spec, context) + spec.state_bytes(FP32))  # a state is written, too
    work = batch * spec.decode_flops_per_token(context)
    return (weights + caches) / (count * device.bytes_per_second), work / (count * device.flops)


def on_device(spec: ModelSpec, name: str, ask: Question, setting: Setting) -> dict[str, Any]:
    """How many devices hold the model and one sequence, how many its training, and the most that they can do."""
    device, weights = find_device(name), BF16 * spec.main_params()
    sequence, count = sequence_bytes(spec, ask.context), 1
    while device.joins and weights + sequence > USABLE * count * device.memory:
        count *= 2
    fits = max(int((USABLE * count * device.memory - weights) // max(sequence, 1)), 0)
    batch = min(fits, MOST_ROWS) if ask.batch is None else ask.batch
    row: dict[str, Any] = {
        "device": name.lower(), "devices": count, "largest_batch": fits, "batch": batch, "fits": 0 < batch <= fits,
        "training_devices": training_devices(spec, device, ask, setting),
    }  # fmt: skip
    if not row["fits"]:
        return row
    for label, rows in (("single", 1), ("batched", batch)):
        read, compute = step_seconds(spec, device, count, rows, ask.context)
        row[f"{label}_tokens_per_second"] = rows / max(read, compute)
        row[f"{label}_limit"] = "memory" if read >= compute else "compute"
    prefill = count * device.flops * ask.context / spec.generation_flops(ask.context)
    row["prefill_tokens_per_second"] = prefill
    if ask.price is not None:
        hourly = ask.price * count
        row["cost_per_million_decoded"] = hourly / 3600 / row["batched_tokens_per_second"] * 1e6
        row["cost_per_million_prefilled"] = hourly / 3600 / prefill * 1e6
    if ask.tokens is not None:
        hours = ask.tokens * spec.training_flops_per_token(ask.context) / (ask.mfu * device.flops) / 3600
        row["training_device_hours"] = hours
        if ask.price is not None:
            row["training_cost"] = hours * ask.price
    return row


# -------------------------------------------------------------------------------------------- models
def find_model(name: str) -> Described:
    """A model by its name, its directory (or an adapter's on it), its config.json, or the TOML of a run that makes it.

    Raises UserError where there is none, or where its maker has published no architecture.
    """
    path = Path(name)
    if path.is_dir() and is_adapter(path):
        base = base_of(path)
        found = find_model(str(base))
        return replace(
            found, notes=(f"this is an adapter; what is priced is its base, {base}, without it", *found.notes)
        )
    if path.is_dir():
        path = path / "config.json"
        if not path.is_file():
            raise UserError(f"{name!r} is no model directory: it has no config.json.")
    if path.suffix == ".json" and path.is_file():
        return _from_json(path)
    if path.suffix == ".toml" or path.is_file():
        return Described(_from_toml(path))
    known = known_model(name)
    if known is None:
        raise UserError(
            f"No model {name!r}: it is neither a file nor a known name.{nearest(name.lower(), known_names())} "
            "`trivet plan --list` shows the known ones."
        )
    return known


def _from_json(path: Path) -> Described:
    try:
        data = json.loads(path.read_text())
    except ValueError:
        data = None
    if isinstance(data, dict) and data.get("model_type") == "trivet":
        return Described(validate(data.get("spec", {}), ModelSpec, str(path)))
    return read_config_file(path)


def _from_toml(path: Path) -> ModelSpec:
    """The `[model]` of a TOML file, or of its first stage with one. A run leaves vocab_size to its tokenizer."""
    table = _stage(path)
    return validate({"vocab_size": _vocab(table), **table["model"]}, ModelSpec, f"{path} [model]")


def find_training(name: str) -> dict[str, Any] | None:
    """What the `[train]` beside a TOML's `[model]` says of a step; None for what is no run. UserError as in a run."""
    path = Path(name)
    if path.suffix != ".toml" or "train" not in (stage := _stage(path)):
        return None
    said = {key: value for key, value in stage["train"].items() if key in Setting.model_fields}
    validate(said, Setting, f"{path} [train]")
    return said


def _stage(path: Path) -> dict[str, Any]:
    data = read_toml(path)
    for table in [data, *data.get("stages", {}).values()]:
        if "model" in table:
            return table
    raise UserError(f"{path} describes no model: it has no [model] table.")


def _vocab(table: dict[str, Any]) -> int:
    """How many tokens a run's tokenizer will have; "bpe:SIZE" is taken at its word."""
    from trivet.chat import Chat, tiny_chat

    kind, _, size = str(table.get("tokenizer", "tiny")).partition(":")
    if kind == "bpe" and size.isdigit():
        return int(size)
    return tiny_chat().vocab_size if kind == "tiny" else Chat.load(Path(table["tokenizer"])).vocab_size
