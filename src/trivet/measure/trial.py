"""`trivet plan --measure`: the plan's numbers beside those of a real step on this machine.

A training step (forward, backward, update), reading a prompt, and decoding run in processes of their own
(`trial_run.py`, where torch is). A model that is too large for the machine is scaled down first: fewer
layers, then fewer experts, a smaller vocabulary, fewer and shorter rows, and only then narrower, which changes
the shape of every product; what was cut is said.

Time is a roofline over what this machine just did with one large product and one large read. What is
measured is slower: that ratio is the point.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

from trivet.config import UserError
from trivet.measure.activations import FP32, Setting
from trivet.measure.memory import matrices, modules, serving_bytes, training_memory
from trivet.spec import ModelSpec, MoE
from trivet.spec.pattern import expand_pattern

SHARE = 0.5  # of the free memory that a trial may plan to take
SECONDS = 2.0  # a training step takes at most, by the roofline
SMALLEST_VOCAB, SHORTEST, NARROWEST = 8192, 512, 256
FREED = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # glibc: freed blocks go back at once, so that the peak is what lives
KEPT = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1), "MALLOC_TOP_PAD_": str(2**26)}
COMPILED = (
    "On a CPU in bf16 a kernel is compiled for every size of an expert's group: tens of MB, which are not predicted."
)
NEWTON_SCHULZ = 5  # steps (train/optim.py)


def try_out(name: str, spec: ModelSpec, setting: Setting, device: str = "auto") -> dict[str, Any]:
    """Predicted and measured bytes and seconds of `spec`, or of what is left of it on this machine.

    Raises UserError where the device can't be used, or where not even one layer of each kind fits.
    """
    can = ask("machine", spec, setting, device, {}, 5)
    setting = setting.model_copy(update={"cpu": not can["cuda"], "shards": 1, "expert_shards": 1})
    small, setting, changes = scale_down(spec, setting, can)
    row: dict[str, Any] = {
        "name": name, "device": "cuda" if can["cuda"] else "cpu", "changes": changes, "params": small.num_params(),
        "setting": setting.model_dump(exclude={"shards", "expert_shards", "cpu"}),
        "flops": can["flops"], "bytes_per_second": can["bytes_per_second"],
    }  # fmt: skip
    memory = {"training step": training_memory(small, setting).peak,
              "serving": serving_bytes(small, setting)}  # fmt: skip
    measured: dict[str, float] = {}
    times: dict[str, float] = {}
    for what, label in (("train", "training step"), ("serve", "serving")):
        fast = ask(what, small, setting, device, KEPT, 2)
        lived = fast if can["cuda"] else ask(what, small, setting, device, FREED, 1)
        measured[label] = lived["bytes"]
        times |= {kind: spent for kind, spent in fast.items() if kind != "bytes"}
        if what == "train" and not can["cuda"]:
            row["kept_bytes"] = fast["bytes"]
    grouped = any(isinstance(layer.ffn, MoE) for layer in small.layers)
    row["notes"] = [COMPILED] if grouped and not can["cuda"] and setting.wide < FP32 else []
    row["memory"] = {label: pair(memory[label], measured[label]) for label in memory}
    predicted = roofline(small, setting, can)
    row["seconds"] = {kind: pair(predicted[kind], times[kind]) for kind in predicted}
    return row


def pair(predicted: float, measured: float) -> dict[str, float]:
    return {"predicted": predicted, "measured": measured, "ratio": measured / predicted}


def ask(
    what: str, spec: ModelSpec, setting: Setting, device: str, allocator: dict[str, str], repeats: int
) -> dict[str, Any]:
    """The answer of one fresh process."""
    question = {
        "what": what, "spec": spec.model_dump(mode="json"), "setting": setting.model_dump(mode="json"),
        "device": device, "repeats": repeats,
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "trivet.measure.trial_run"],
        input=json.dumps(question), capture_output=True, text=True, env=os.environ | allocator,
    )  # fmt: skip
    if done.returncode == 0:
        return json.loads(done.stdout)
    last = done.stderr.strip().splitlines()[-1:] or [f"it ended with {done.returncode}, perhaps for want of memory"]
    raise UserError(f"--measure: the {what} trial on {device!r} failed: {last[0]}")


# ------------------------------------------------------------------------------------------- roofline
def roofline(spec: ModelSpec, s: Setting, can: dict[str, float]) -> dict[str, float]:
    """Seconds, at best, of a training step, of reading a prompt in every row, of one step of decoding after it."""
    d, active = spec.d_model, s.tokens * s.accumulate
    memory = training_memory(spec, s)
    ahead = spec.mtp * sum(m.numbers for m in matrices(spec.layers[-1], d) if not m.routed)
    ahead += spec.mtp * (2 * d * d + spec.vocab_size * d)
    work = active * (spec.training_flops_per_token(s.length) + 6 * ahead) * (4 / 3 if s.recompute else 1)
    moved = s.accumulate * (2 * memory.activations + 3 * memory.weights)
    moved += 3 * memory.weights + memory.gradients + 2 * memory.optimizer  # the update
    head = 2 * spec.vocab_size * d
    weights = s.wide * (spec.touched_params(s.tokens) - spec.vocab_size * d * (not spec.tie_embeddings))
    prompt = s.rows * (spec.generation_flops(s.length) - (s.length - 1) * head)
    step = s.wide * (spec.touched_params(s.rows) - spec.vocab_size * d * (not spec.tie_embeddings))
    step += s.rows * (spec.cache_bytes_per_token(s.wide) * s.length + 2 * spec.state_bytes(FP32))

    def at_best(flops: float, bytes_: float) -> float:
        return max(flops / can["flops"], bytes_ / can["bytes_per_second"])

    return {
        "train": at_best(work, moved) + muon_flops(spec) / can["update_flops"],
        "prefill": at_best(prompt, weights),
        "decode": at_best(s.rows * spec.decode_flops_per_token(s.length), step),
    }


def muon_flops(spec: ModelSpec) -> float:
    """Newton-Schulz of every matrix of s rows and l columns: 4 s^2 l + 2 s^3 a step."""
    total = 0.0
    for m in (m for layer in modules(spec) for m in matrices(layer, spec.d_model)):
        short, long = sorted((m.rows, m.columns))
        total += NEWTON_SCHULZ * m.copies * (4 * short**2 * long + 2 * short**3)
    return total


# ---------------------------------------------------------------------------------------- scaling down
Cut = tuple[ModelSpec, Setting] | None  # None: it can't be cut further


def scale_down(spec: ModelSpec, s: Setting, can: dict[str, float]) -> tuple[ModelSpec, Setting, list[str]]:
    """The model and the step, cut until they fit the machine's memory and patience; what was cut, in words."""
    small, setting = spec, s
    for cut in (fewer_layers, fewer_experts, smaller_vocab, fewer_rows, shorter_rows, narrower):
        while not fits(small, setting, can) and (done := cut(small, setting)) is not None:
            small, setting = done
    if need(small, setting) > SHARE * can["memory"]:
        raise UserError(
            f"--measure: even the smallest part of this model takes {need(small, setting) / 1e9:.2g} GB, more than "
            f"half of the {can['memory'] / 1e9:.2g} GB that are free; take fewer --rows or a shorter --length."
        )
    sizes = [
        ("layers", len(spec.layers), len(small.layers)),
        ("experts", most_experts(spec), most_experts(small)),
        ("vocabulary", spec.vocab_size, small.vocab_size),
        ("rows", s.rows, setting.rows),
        ("length", s.length, setting.length),
        ("d_model, with heads and ffns", spec.d_model, small.d_model),
    ]
    return small, setting, [f"{what} {old:,} → {new:,}" for what, old, new in sizes if old != new]


def fits(spec: ModelSpec, s: Setting, can: dict[str, float]) -> bool:
    return need(spec, s) <= SHARE * can["memory"] and roofline(spec, s, can)["train"] <= SECONDS


def need(spec: ModelSpec, s: Setting) -> int:
    return max(training_memory(spec, s).peak, serving_bytes(spec, s))


def most_experts(spec: ModelSpec) -> int:
    return max((ffn.experts for ffn in spec.ffns.values() if isinstance(ffn, MoE)), default=0)


def remade(spec: ModelSpec, **changes: Any) -> ModelSpec:
    """The spec with changes, checked again. Raises ValueError where they do not fit together."""
    return ModelSpec(**{**spec.model_dump(), **changes})


def fewer_layers(spec: ModelSpec, s: Setting) -> Cut:
    """Half of them, of each kind at least one, in their order."""
    names = expand_pattern(spec.pattern)
    kinds = [names.index(name) for name in dict.fromkeys(names)]
    if len(names) == len(kinds):
        return None
    others = [at for at in range(len(names)) if at not in kinds]
    kept = sorted([*kinds, *others[: max(0, len(names) // 2 - len(kinds))]])
    return remade(spec, pattern=" ".join(names[at] for at in kept)), s


def fewer_experts(spec: ModelSpec, s: Setting) -> Cut:
    ffns = {name: ffn.model_dump() for name, ffn in spec.ffns.items()}
    for ffn in (ffn for ffn in ffns.values() if ffn["kind"] == "moe"):
        ffn["experts"] //= 2
    try:
        return (remade(spec, ffns=ffns), s) if most_experts(spec) else None
    except ValueError:
        return None  # fewer than a token chooses


def smaller_vocab(spec: ModelSpec, s: Setting) -> Cut:
    size = max(SMALLEST_VOCAB, spec.vocab_size // 2)
    return (remade(spec, vocab_size=size), s) if size < spec.vocab_size else None


def fewer_rows(spec: ModelSpec, s: Setting) -> Cut:
    return (spec, s.model_copy(update={"rows": s.rows // 2})) if s.rows > 1 else None


def shorter_rows(spec: ModelSpec, s: Setting) -> Cut:
    length = max(SHORTEST, s.length // 2)
    return (spec, s.model_copy(update={"length": length})) if length < s.length else None


WIDTHS = {"gqa": ("heads", "kv_heads"), "mla": ("heads", "q_rank", "kv_rank"), "lightning": ("heads",),
          "delta": ("heads", "key_heads"), "swiglu": ("hidden",), "moe": ("hidden", "shared_hidden")}  # fmt: skip


def narrower(spec: ModelSpec, s: Setting) -> Cut:
    """Half as wide, heads of the same width: the last resort, because it changes the shape of every product."""

    def halved(part: dict[str, Any]) -> dict[str, Any]:
        return part | {key: max(1, part[key] // 2) for key in WIDTHS[part["kind"]] if part[key]}

    if spec.d_model < 2 * NARROWEST or spec.d_model % 16:
        return None
    tables = {
        which: {name: halved(part) for name, part in spec.model_dump()[which].items()} for which in ("mixers", "ffns")
    }
    return remade(spec, d_model=spec.d_model // 2, **tables), s
