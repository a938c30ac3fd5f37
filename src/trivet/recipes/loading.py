"""How a model is loaded to be used: on what device, with what context, in how many bits, with what cache, and with what to
guess ahead. The options of chat and eval."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console

from trivet.chat import Chat
from trivet.config import UserError
from trivet.engine.calibrate import calibrate, written
from trivet.engine.policy import Policy, RankByAge, parse_policy
from trivet.engine.speculate import MTP, Draft, Drafter, NGram
from trivet.hub.checkpoint import load_any, load_pair
from trivet.model import Transformer
from trivet.model.quant import quantise

CALIBRATION_TOKENS = 256  # of a text for a low-rank cache, at most


@dataclass(frozen=True)
class Loading:
    device: torch.device
    rope_yarn: float | None = None
    dual_chunk: float | None = None
    weights: Literal["int8", "int4"] | None = None

    def load(self, directory: Path, console: Console) -> tuple[Transformer, Chat]:
        """A model to generate with, and what it reads and writes. Raises UserError."""
        dtype = torch.bfloat16 if self.weights == "int4" else None
        model, chat = load_pair(directory, self.device, dtype, self.rope_yarn, self.dual_chunk)
        if self.weights is not None:
            before, after, left = quantise(model, self.weights)
            text = f"Weights in {self.weights}: {after / 1e6:,.1f} MB instead of {before / 1e6:,.1f}."
            text += f" {left} matrices stay as they are: their shape does not fit." if left else ""
            console.print(text, style="dim", markup=False)
        return model.eval(), chat


def ready_policy(
    cache: str, model: Transformer, chat: Chat, question: Callable[[int], str], count: int, slots: int
) -> Policy:
    """A policy by its name; one of low rank is calibrated on the model's own answers. Raises UserError for others."""
    policy = parse_policy(cache)
    if not isinstance(policy, RankByAge):
        policy.check(model.spec)
        return policy
    policy.fits(model.spec)
    texts = written(model.eval(), chat, [question(i) for i in range(count)], CALIBRATION_TOKENS, slots)
    return policy.with_bases(calibrate(model, texts))


def drafter_of(text: str, model: Transformer, device: torch.device) -> Drafter:
    """`ngram:4`, `mtp:2` or `DIRECTORY:4` as a drafter that guesses so many tokens ahead. Raises UserError."""
    what, colon, number = text.rpartition(":")
    if not colon or not number.isdigit() or int(number) < 1:
        raise UserError(f"--guess {text!r} should read WHAT:TOKENS, for example ngram:4, mtp:2 or runs/small:4.")
    ahead = int(number)
    if what == "ngram":
        return NGram(ahead)
    return MTP(model, ahead) if what == "mtp" else Draft(load_any(Path(what), device).eval(), model, ahead)
