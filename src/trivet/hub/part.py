"""A part of a checkpoint: some of its layers, some of its experts. Real weights, small enough to debug with.

A part is a model of its own, with embedding, final norm and head. Its router chooses among the experts that
were kept, and lightning attention decays as a model of its depth does (the rates depend on the number of
layers), so it computes less than the whole and not a piece of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trivet.config import UserError
from trivet.spec import ModelSpec, MoE, expand_pattern, write_pattern

Numbers = int | Sequence[int] | None  # the first n; these; all


@dataclass(frozen=True)
class Part:
    """`layers`: the checkpoint's number of each of ours. `experts`: likewise, in every sparse layer; None: all."""

    layers: tuple[int, ...]
    experts: tuple[int, ...] | None = None


def parse_numbers(text: str, option: str) -> Numbers:
    """`"8"` the first eight, `"0:4"` as Python slices, `"0:4,60"` a list. Raises UserError."""
    if text.isdigit():
        return int(text)
    numbers: list[int] = []
    for word in text.split(","):
        first, colon, end = word.partition(":")
        if not first.isdigit() or (colon and not end.isdigit()):
            raise UserError(f"{option} {text!r} should read N (the first N), A:B, or a list such as 0:4,7.")
        numbers += range(int(first), int(end)) if colon else [int(first)]
    return numbers


def cut(spec: ModelSpec, layers: Numbers, experts: Numbers, where: str) -> tuple[ModelSpec, Part]:
    """The spec of a part, and where its pieces come from. Raises UserError where they make no model.

    Prediction modules go where layers are named: they follow the last layer of the whole.
    """
    names = expand_pattern(spec.pattern)
    kept = _picked(layers, len(names), f"{where}: layers")
    if layers is not None:
        spec = spec.model_copy(update={"pattern": write_pattern([names[i] for i in kept]), "mtp": 0})
    if experts is None:
        return spec, Part(kept)
    counts = {ffn.experts for ffn in spec.ffns.values() if isinstance(ffn, MoE)}
    if len(counts) != 1:
        raise UserError(f"{where}: experts can be chosen where all sparse layers have equally many, and it has {counts or 'none'}.")  # fmt: skip
    chosen = _picked(experts, counts.pop(), f"{where}: experts")
    ffns = {name: _fewer(ffn, chosen, where) if isinstance(ffn, MoE) else ffn for name, ffn in spec.ffns.items()}
    return spec.model_copy(update={"ffns": ffns}), Part(kept, chosen)


def _picked(numbers: Numbers, count: int, where: str) -> tuple[int, ...]:
    wanted = range(count) if numbers is None else range(numbers) if isinstance(numbers, int) else numbers
    picked = tuple(sorted(set(wanted)))
    if not picked or picked[0] < 0 or picked[-1] >= count:
        raise UserError(f"{where}: {list(wanted)} asked for; there are 0 to {count - 1}.")
    return picked


def _fewer(moe: MoE, experts: tuple[int, ...], where: str) -> MoE:
    """Groups stay groups: each that is kept must keep equally many."""
    size = moe.experts // moe.groups
    per_group = [sum(e // size == g for e in experts) for g in range(moe.groups)]
    groups = [n for n in per_group if n]
    if len(set(groups)) > 1:
        raise UserError(
            f"{where}: these experts are {per_group} of the {moe.groups} groups; each group that is kept needs equally many."
        )
    top_groups = min(moe.top_groups, len(groups))
    least = 2 if moe.groups > 1 and moe.group_score == "top2" else 1
    if groups[0] < least or moe.top_k > top_groups * groups[0]:
        raise UserError(
            f"{where}: a token chooses {moe.top_k} experts in {top_groups} of {len(groups)} groups; {len(experts)} are too few."
        )
    return moe.model_copy(update={"experts": len(experts), "groups": len(groups), "top_groups": top_groups})
