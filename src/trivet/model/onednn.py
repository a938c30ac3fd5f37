"""fp32 products of many rows on an AMD CPU, by oneDNN.

PyTorch hands fp32 products to MKL, which on AMD's processors with AVX512 reaches less than half of what oneDNN does
(docs/LOG.md); both are in every PyTorch. Not for small products, because oneDNN compiles a kernel for each new shape first.

A row's result does not depend on the rows beside it, as long as there are two. Left out: bf16, which PyTorch gives to
oneDNN itself, and other processors, where nothing was measured; there the products are PyTorch's own.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

LEAST = 2**24  # multiplications that are worth a kernel's compilation


@functools.cache
def faster() -> bool:
    """Whether this machine is one of those."""
    told = Path("/proc/cpuinfo")
    amd = told.exists() and "AuthenticAMD" in told.read_text()
    return amd and torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [...,in], weight [out,in] in any strides -> x weight^T + bias [...,out]."""
    if weight.dtype != x.dtype or not applies(x, x.numel() * len(weight)):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled():
        return cast(Tensor, _Linear.apply(x, weight, bias))
    return _product(x, weight, bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), wanted = ctx.saved_tensors, ctx.needs_input_grad
        flat = grad.flatten(0, -2)
        return (
            times(grad, weight.T) if wanted[0] else None,
            times(flat.T, x.flatten(0, -2).T) if wanted[1] else None,
            flat.sum(0) if wanted[2] else None,
        )


def times(a: Tensor, b: Tensor) -> Tensor:
    """a [...,n,k], b [m,k], both in any strides -> a b^T [...,n,m], where nobody wants a gradient."""
    if a.dtype != b.dtype or not applies(a, a.numel() * len(b)):
        return a @ b.T
    if a.ndim == 2 and not a.is_contiguous() and a.numel() > b.numel():  # the first one is copied then: the smaller one
        return _product(b, a, None).T
    return _product(a, b, None)


def matmul(a: Tensor, b: Tensor) -> Tensor | None:
    """a [P,n,k], b [P,k,m] in any strides -> [P,n,m]; None where it does not apply, outside of inference mode too."""
    if not applies_in_inference(a, a.shape[1] * b.shape[1] * b.shape[2]):
        return None
    return torch.stack([_product(x, y.T, None) for x, y in zip(a, b, strict=True)])


def grouped(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor | None:
    """Rows x [S,in] in groups that end at ends [E], each with its own weight [E,out,in], in any strides -> [S,out].

    None as above: in training groups change size at every step, and each size is one more compiled kernel to keep.
    """
    if not applies_in_inference(x, len(x) * weight[0].numel() // len(weight)):
        return None
    y, borders = x.new_empty(len(x), weight.shape[1]), [0, *ends.tolist()]
    for i, j, w in zip(borders, borders[1:], weight, strict=False):
        if i < j:
            y[i:j] = _product(x[i:j], w, None)
    return y


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x.contiguous(), dense(weight), bias, "none", [], "")
    return y


def dense(x: Tensor) -> Tensor:
    """x [n,m] with no gaps between its rows, or its columns: others go to a kernel a hundred times as slow."""
    rows, columns = x.shape
    return x if x.stride() in ((columns, 1), (1, rows)) else x.contiguous()


def applies(x: Tensor, multiplications: int) -> bool:
    """Whether a product of x with a weight of its type, of so many multiplications, is one for oneDNN."""
    return (
        multiplications >= LEAST and x.is_cpu and x.dtype == torch.float32 and type(x) in (Tensor, torch.nn.Parameter)
        and not torch.is_autocast_enabled("cpu") and faster()
    )  # fmt: skip


def applies_in_inference(x: Tensor, multiplications: int) -> bool:
    return torch.is_inference_mode_enabled() and applies(x, multiplications)
