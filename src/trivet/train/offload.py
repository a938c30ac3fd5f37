"""What an optimizer works with, kept in host memory: the accelerator is left with weights, activations and, for a while, gradients.

    none        weights, gradients and moments on the device
    optimizer   moments, and the weights that are stepped, on the host; gradients follow when they are whole
    gradients   each gradient follows as soon as autograd has made it, and frees its place; microbatches add up on the host

The step happens on the host in fp32, and what it changed is copied back. Only Muon's matrix products, most of its work, happen
where the model is, a stack at a time. On a CPU, where nothing is saved, the bits are those of `none`; elsewhere a host may
round otherwise than a device. What is stored of a run is the same, so it may go on with another setting.

Not tried on a GPU yet. Left out: pinned memory, and copies while something else computes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from trivet.train.optim import Optimizer, orthogonalize
from trivet.train.parallel import Parts, local

Where = Literal["none", "optimizer", "gradients"]
Groups = Mapping[str, Mapping[str, Tensor]]


def make_optimizer(
    offload: Where, groups: Groups, muon_lr: float, adam_lr: float, weight_decay: float, parts: Parts | None = None
) -> Optimizer:
    if offload == "none":
        return Optimizer(groups, muon_lr, adam_lr, weight_decay, parts=parts)
    return Offloaded(groups, muon_lr, adam_lr, weight_decay, parts=parts, gradients=offload == "gradients")


class Offloaded(Optimizer):
    """An Optimizer of copies on the host. Its `parameters()`, and their gradients once these are collected, are the copies."""

    def __init__(
        self, groups: Groups, muon_lr: float, adam_lr: float, weight_decay: float, *, parts: Parts | None = None,
        gradients: bool,
    ) -> None:  # fmt: skip
        self.on_device = {name: p for table in groups.values() for name, p in table.items()}
        copies = {
            kind: {name: local(p).detach().to("cpu", copy=True) for name, p in table.items()}
            for kind, table in groups.items()
        }
        super().__init__(copies, muon_lr, adam_lr, weight_decay, parts=parts)
        self.copies = self.named()
        if gradients:
            for name, p in self.on_device.items():
                p.register_post_accumulate_grad_hook(partial(self._move, name))

    @torch.no_grad()
    def _move(self, name: str, p: Tensor) -> None:
        """Add a gradient to the copy's and free its place on the device."""
        assert p.grad is not None
        copy, grad = self.copies[name], local(p.grad).to("cpu")
        copy.grad = grad if copy.grad is None else copy.grad.add_(grad)
        p.grad = None

    def collect_gradients(self) -> None:
        for name, p in self.on_device.items():
            if p.grad is not None:
                self._move(name, p)

    @torch.no_grad()
    def step(self, lr_scale: float = 1.0) -> None:
        super().step(lr_scale)
        for name, p in self.on_device.items():
            if self.copies[name].grad is not None:
                local(p).copy_(self.copies[name])

    def _orthogonal(self, updates: Sequence[Tensor]) -> list[Tensor]:
        device = local(next(iter(self.on_device.values()))).device
        return [x.to("cpu") for x in orthogonalize([x.to(device) for x in updates])]

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """The model has its stored weights by then."""
        super().load_state_dict(state)
        for name, p in self.on_device.items():
            self.copies[name].copy_(local(p))
