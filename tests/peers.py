"""Transformers' models as peers: random weights in theirs, the same weights in ours. For tests and benchmarks."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import nn

from trivet.hub.checkpoint import load_checkpoint
from trivet.model import Transformer


def randomise(model: nn.Module, seed: int = 0, std: float = 0.15) -> None:
    """Matrices with variance 1/fan_in, plus noise on everything: no norm is 1, no bias 0."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.copy_(torch.randn(p.shape, generator=g) * p.shape[-1] ** -0.5)
            else:
                p.add_(torch.randn(p.shape, generator=g) * std)
        for name, b in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                b.copy_(torch.randn(b.shape, generator=g) * std)


def twin(theirs: nn.Module) -> Transformer:
    """Our model with the weights, type and device of a transformers causal LM, by way of a checkpoint."""
    weight = next(theirs.parameters())
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)  # type: ignore[operator]
        return load_checkpoint(Path(folder), weight.device, weight.dtype)


def gradients(theirs: nn.Module, ours: Transformer) -> dict[str, torch.Tensor]:
    """The gradients of their parameters under our names: a checkpoint whose weights are gradients."""
    kept = [p.detach().clone() for p in theirs.parameters()]
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(p.grad if p.grad is not None else torch.zeros_like(p))
    found = twin(theirs).state_dict()
    with torch.no_grad():
        for p, before in zip(theirs.parameters(), kept, strict=True):
            p.copy_(before)
    return {name: found[name] for name, _ in ours.named_parameters()}
