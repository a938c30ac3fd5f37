"""The policy that a KL term holds on to: the one that a run started with.

Where the whole model learns that is a frozen copy of it. Where only adapters learn, the base is its own
copy: the forward pass runs with the adapters as they were (which do nothing, if they were new).
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from torch.func import functional_call

from trivet.model import Routing, Transformer
from trivet.model.lora import adapter_parameters
from trivet.model.packed import Apart


class Reference:
    """To be made before the first step, and before a stored state is applied."""

    def __init__(self, model: Transformer) -> None:
        self.adapters = {name: p.detach().clone() for name, p in adapter_parameters(model).items()}
        self.model = model if self.adapters else copy.deepcopy(model).requires_grad_(False)

    def __call__(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        routing: Routing | None = None,
        recompute: bool = False,
        apart: Apart | None = None,
    ) -> Tensor:
        """tokens [B,T] -> hidden [B,T,D], as `Transformer.forward` in training, but not to be differentiated.

        So there is nothing to compute again: with `recompute` it is what it is without.
        """
        with torch.no_grad():
            given = {"routing": routing, "apart": apart}
            hidden: Tensor = functional_call(self.model, self.adapters, (tokens, positions), given)
        return hidden

    @property
    def head_weight(self) -> Tensor:
        return self.model.head_weight
