"""How a model is loaded to be used: on what device, with what context, in how many bits. The options of chat and eval."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console

from trivet.chat import Chat
from trivet.hub.checkpoint import load_pair
from trivet.model import Transformer
from trivet.model.quant import quantise


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
            before, after = quantise(model, self.weights)
            text = f"Weights in {self.weights}: {after / 1e6:,.1f} MB instead of {before / 1e6:,.1f}."
            console.print(text, style="dim", markup=False)
        return model.eval(), chat
