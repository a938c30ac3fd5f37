"""fp32 products of many rows on an AMD CPU, by oneDNN.

PyTorch hands fp32 products to MKL, which on AMD's processors with AVX512 reaches less than half of what oneDNN does
(docs/LOG.md); both are in every PyTorch. Only in inference mode, where nobody wants a gradient, and not for small products,
because oneDNN compiles a kernel for each new shape first. The functions give None where they don't apply.

A row's result does not depend on the rows beside it, as long as there are two. Left out: bf16, which PyTorch gives to
oneDNN itself, and other processors, where nothing was measured.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor

LEAST = 2**22  # multiplications that are worth a kernel's compilation


@functools.cache
def faster() -> bool:
    """Whether this machine is one of those."""
    told = Path("/proc/cpuinfo")
    amd = told.exists() and "AuthenticAMD" in told.read_text()
    return amd and torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    """x [...,in], weight [out,in] in any strides -> x weight^T + bias [...,out]."""
    if weight.dtype != x.dtype or not applies(x, x.numel() * len(weight)):
        return None
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x.contiguous(), dense(weight), bias, "none", [], "")
    return y


def matmul(a: Tensor, b: Tensor) -> Tensor | None:
    """a [P,n,k], b [P,k,m] in any strides -> [P,n,m]."""
    if not applies(a, a.shape[1] * b.shape[1] * b.shape[2]):
        return None
    product = torch.ops.mkldnn._linear_pointwise
    return torch.stack([product(x.contiguous(), dense(y.T), None, "none", [], "") for x, y in zip(a, b, strict=True)])


def grouped(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor | None:
    """Rows x [S,in] in groups that end at ends [E], each with its own weight [E,out,in], in any strides -> [S,out]."""
    if not applies(x, len(x) * weight[0].numel() // len(weight)):
        return None
    product, borders = torch.ops.mkldnn._linear_pointwise, [0, *ends.tolist()]
    groups = zip(borders, borders[1:], weight, strict=False)
    return torch.cat([product(x[i:j], dense(w), None, "none", [], "") for i, j, w in groups if i < j])


def dense(x: Tensor) -> Tensor:
    """x [n,m] with no gaps between its rows, or its columns: others go to a kernel a hundred times as slow."""
    rows, columns = x.shape
    return x if x.stride() in ((columns, 1), (1, rows)) else x.contiguous()


def applies(x: Tensor, multiplications: int) -> bool:
    """Whether a product of x with a weight of its type, of so many multiplications, is one for oneDNN."""
    return (
        multiplications >= LEAST and torch.is_inference_mode_enabled() and x.is_cpu and x.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu") and faster()
    )  # fmt: skip
