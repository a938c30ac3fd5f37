"""`lora = {...}` of a stage: what a start becomes before training, and what is written after it."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from trivet.chat import Chat
from trivet.config import UserError
from trivet.disk import atomic_dir
from trivet.hub.adapter import choose, save_adapter
from trivet.hub.base import CONFIG, base_of, family_of, is_adapter
from trivet.model import Transformer, save_model
from trivet.model.lora import LoRA, Size, adapter_parameters, adapters, attach, merge


def prepare(model: Transformer, lora: LoRA | None, start: Path, seed: int, say: Callable[[str], None]) -> None:
    """Make a start ready to learn: with adapters, new ones or the start's own; or as a whole model.

    Raises UserError where the start's adapter isn't what `lora` describes.
    """
    if lora is None:
        if is_adapter(start):
            say(f"{start}: its adapter is merged into the weights, all of which are trained")
        merge(model)
        return
    wanted = choose(model, family_of(base_of(start)), lora)
    if not is_adapter(start):
        attach(model, wanted, seed)
    elif {place: Size(a.rank, a.alpha, a.rslora) for place, a in adapters(model).items()} != wanted:
        raise UserError(
            f"{start} holds an adapter of another rank, alpha or targets than `lora` says: give the same to go on with "
            "it, or export it to a whole model and start from that."
        )
    elif json.loads((start / CONFIG).read_text()).get("lora_dropout"):
        warnings.warn(
            f"{start} was trained with lora_dropout, which is not computed here: it goes on without.", stacklevel=2
        )
    trained = sum(p.numel() for p in adapter_parameters(model).values())
    total = sum(p.numel() for p in model.parameters())
    say(f"LoRA: {trained:,} of {total:,} parameters are trained ({trained / total:.2%})")


def save_result(model: Transformer, chat: Chat, out: Path, start: Path | None) -> None:
    """The standard files of a model directory, or of an adapter's, each replaced as a whole."""
    with result(out) as aside:
        if start is not None and adapters(model):
            base = base_of(start)
            save_adapter(model, aside, base, family_of(base))
        else:
            save_model(model, aside)
        chat.save(aside)


@contextmanager
def result(out: Path) -> Iterator[Path]:
    """A folder to write a stage's final files to; they are then moved to `out`, each replaced as a whole."""
    with atomic_dir(out / ".final") as aside:
        yield aside
    for file in sorted((out / ".final").iterdir()):
        file.rename(out / file.name)
    (out / ".final").rmdir()
