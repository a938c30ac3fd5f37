"""Decoding at the memory's bandwidth on a CPU: a few compiled kernels, used in inference mode only.

A step of decoding reads every weight and every cache once, so its floor is bytes / bandwidth. PyTorch's
bf16 product of one row reaches half of that, its attention of one query a quarter, and a model's
small operations cost more than their numbers. `kernels.cpp` has one kernel for each part of a step.

`kernels(x, ...)` hands them out where they apply and None elsewhere. The callers hold the PyTorch form
beside the kernel, which is the reference: tests keep both equal. Training never meets a kernel, and neither
does whatever is compared with training to the last bit (no_grad), because inference mode says that
nobody will want a gradient of these numbers.

In fp32 and bf16, sums in fp32; a row's result does not depend on the rows beside it. TRIVET_NATIVE=0
switches the kernels off.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from trivet.model.native.build import load

# Rows up to which a kernel beats the library's product, which reuses a weight better (docs/LOG.md).
TYPES = (torch.float32, torch.bfloat16)
FEW_ROWS = 64
FEW_QUERIES = 8  # of a row: more are a prompt's piece, for which keys should be read once for many queries
FEW_CHOICES = 16  # (token, choice) pairs for each expert, on average


class Kernels(Protocol):
    """What kernels.cpp offers. Tensors of one type, the last dimension without gaps."""

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x [...,in], weight [...,in] whose leading dimensions are its rows -> [...,rows]."""
        ...

    def per_head(self, x: Tensor, weight: Tensor) -> Tensor:
        """x [N,H,in], weight [H,in,out] or such a view of [H,out,in] -> [N,H,out]."""
        ...

    def attend(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, scale: float, window: int | None) -> Tensor:
        """q [B,T,H,hd], k [B,S,K,hd], v [B,S,K,vd] -> [B,T,H,vd].

        The query at positions[b,t] sees the slots up to its own, or the last `window` of them; -1 (padding) slot 0.
        Only slots that are seen are read, and once for all heads of a group.
        """
        ...

    def remember(self, store: Tensor, fresh: Tensor, positions: Tensor) -> None:
        """Writes fresh [B,T,K,hd] into slots positions[b,t] of store [rows,slots,K,hd]; -1: the last slot."""
        ...

    def silu_mul(self, x: Tensor) -> Tensor:
        """x [...,2F], gates and then ups -> silu(gate) up [...,F]."""
        ...

    def route(
        self, x: Tensor, router: Tensor, bias: Tensor | None, top_k: int, softmax: bool, norm: bool, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x [N,D], router [E,D], bias [E] in fp32 -> scores [N,E] in fp32, chosen [N,k], gates [N,k]. Without groups."""
        ...

    def experts(self, x: Tensor, chosen: Tensor, gates: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        """A `Form` of ffn.py: the chosen experts' rows only, each read once for all of its tokens."""
        ...

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, centred: bool) -> Tensor:
        """x [...,D] -> [...,D]; centred: the weight is 1 + what is stored."""
        ...

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        """`apply_rope`: x [B,T,heads,hd], cos and sin [B or 1,T,dims/2] in fp32 -> [B,T,heads,hd]."""
        ...

    def swiglu(self, x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        """x [...,D], gate_up [2,F,D], down [D,F] -> [...,D]: linear, silu_mul, linear."""
        ...

    def heads(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, width: int, norm: Tensor | None, eps: float, centred: bool,
        cos: Tensor, sin: Tensor, interleaved: bool,
    ) -> Tensor:  # fmt: skip
        """x [B,T,D] -> [B,T,heads,width]: linear, rms_norm (of a head, or of all if its weight is longer), rotate."""
        ...


def kernels(x: Tensor, *others: Tensor) -> Kernels | None:
    """The kernels, if they can take these tensors and nobody will ask for a gradient; else None."""
    if not torch.is_inference_mode_enabled() or x.dtype not in TYPES or not x.is_cpu:
        return None
    for other in others:  # a loop, because this runs a hundred times a token
        if other.dtype != x.dtype:
            return None
    if torch.is_autocast_enabled("cpu"):
        return None
    return load()
