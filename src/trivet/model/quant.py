"""Weight-only quantisation for inference: matrices of attention, ffns and experts in 8 or 4 bits, the rest as it is.

    int8   w ~ s_n q,  q in [-127, 127], one scale a row (output)
    int4   w ~ s (q - 8) + z,  q in [0, 15], one scale and zero for each 32 inputs of a row (round to nearest)

Activations keep their type. On a CPU torch's packed kernels read the small weights and never form the large ones; elsewhere
the product is with the weights dequantised, which is also the reference form that the tests compare with.
Experts go one by one, because grouped products have no packed form: memory is saved, and at many experts time is not.
Left as they are: embedding, head, norms, routers, and MLA's kv_up, which decoding absorbs into the query. What is
quantised can't be trained or saved.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trivet.config import UserError
from trivet.model.ffn import DenseFFN, MoEFFN, Routing
from trivet.model.layers import Layout, Linear
from trivet.model.mla import LatentAttention
from trivet.model.transformer import Transformer

Bits = Literal["int8", "int4"]
GROUP = 32  # inputs that share a scale in int4
TILES = 8  # of torch's int4 packing on a GPU; its CPU kernel ignores it
ROWS = 16  # outputs that torch's int4 kernel takes at a time


def int8_weights(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[N,K] -> q int8 [N,K], scale [N]: the row's largest weight is 127."""
    scale = weight.float().abs().amax(-1).clamp_min(1e-12) / 127
    return (weight.float() / scale[:, None]).round().to(torch.int8), scale.to(weight.dtype)


def int4_weights(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[N,K] -> q int32 [N,K] in 0..15, scale and zero [N,K/GROUP]: a group's smallest weight is 0, its largest 15."""
    groups = weight.float().unflatten(-1, (-1, GROUP))
    low, high = groups.amin(-1), groups.amax(-1)
    # The kernel computes with the rounded scale and zero, so they are rounded before the weights are.
    scale = ((high - low).clamp_min(1e-9) / 15).to(weight.dtype)
    zero = (low + 8 * scale.float()).to(weight.dtype)
    q = ((groups - zero.float()[..., None]) / scale.float()[..., None]).round() + 8
    return q.clamp(0, 15).flatten(-2).to(torch.int32), scale, zero


class QuantLinear(nn.Module):
    """A linear layer with small weights: x [..., K] -> [..., N]."""

    q: Tensor
    scale: Tensor
    zero: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None, bits: Bits) -> None:
        super().__init__()
        self.bits = bits
        self.shape = weight.shape
        self.register_buffer("bias", None if bias is None else bias.detach())
        self.packed = weight.device.type == "cpu"
        if bits == "int8":
            q, scale = int8_weights(weight.detach())
            zero = scale.new_zeros(0)
        else:
            q, scale, zero = int4_weights(weight.detach())
            if self.packed:
                q = torch._convert_weight_to_int4pack_for_cpu(q, TILES)
                scale = torch.stack((scale, zero), -1).transpose(0, 1).contiguous()  # [K/GROUP,N,2]
            else:
                q = q.to(torch.uint8)
        for name, tensor in (("q", q), ("scale", scale), ("zero", zero)):
            self.register_buffer(name, tensor)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, -2)
        if not self.packed:
            y = F.linear(flat, self.dequantised())
        elif self.bits == "int8":
            y = torch._weight_int8pack_mm(flat, self.q, self.scale)
        else:
            y = torch._weight_int4pack_mm_for_cpu(flat, self.q, GROUP, self.scale)
        return (y if self.bias is None else y + self.bias).unflatten(0, x.shape[:-1])

    def dequantised(self) -> Tensor:
        """[N,K] the matrix that it stands for. Only of weights that are not packed, and of int8."""
        if self.bits == "int8":
            return self.q.to(self.scale.dtype) * self.scale[:, None]
        groups = self.q.float().unflatten(-1, (-1, GROUP))
        return (
            ((groups - 8) * self.scale.float()[..., None] + self.zero.float()[..., None])
            .flatten(-2)
            .to(self.scale.dtype)
        )


class QuantFFN(nn.Module):
    """SwiGLU with small weights."""

    def __init__(self, gate_up: Tensor, down: Tensor, bits: Bits) -> None:
        """gate_up [2,F,D], down [D,F]."""
        super().__init__()
        self.gate_up = QuantLinear(gate_up.flatten(0, 1), None, bits)
        self.down = QuantLinear(down, None, bits)

    def forward(self, x: Tensor, layout: Layout | None = None, routing: Routing | None = None) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, -1)
        out: Tensor = self.down(F.silu(gate) * up)
        return out


class QuantExperts(nn.Module):
    """The sum over chosen experts with small weights: x [N,D], chosen and gates [N,k] -> [N,D]."""

    def __init__(self, moe: MoEFFN, bits: Bits) -> None:
        super().__init__()
        each = zip(moe.gate_up, moe.down, strict=True)  # [2,F,D] and, input-major, [F,D]
        self.each = nn.ModuleList(QuantFFN(gate_up, down.T.contiguous(), bits) for gate_up, down in each)

    def forward(self, x: Tensor, chosen: Tensor, gates: Tensor) -> Tensor:
        y = torch.zeros(x.shape, device=x.device)
        for expert in chosen.unique().tolist():
            token, choice = (chosen == expert).nonzero(as_tuple=True)
            y.index_add_(0, token, (self.each[expert](x[token]) * gates[token, choice, None]).float())
        return y.to(x.dtype)


def quantise(model: Transformer, bits: Bits) -> tuple[int, int, int]:
    """Replace the model's matrices in place. Raises UserError.

    -> bytes of all its tensors before and after, and how many layers stayed as they are for their shape.

    int4's kernel computes in bf16 only, and wants inputs in multiples of 32 and outputs of 16; a matrix that has
    others stays as it is.
    """
    if bits == "int4" and model.embed.dtype != torch.bfloat16:
        raise UserError("int4 weights are computed with in bf16 only: load the model in bf16.")
    if any(".lora." in name for name, _ in model.named_parameters()):
        raise UserError("Merge the adapter before the weights are quantised: trivet export does.")
    before, left = _bytes(model), 0
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Linear) and not _absorbed(module, name):
                fits = _fits(child.weight, bits)
                if fits:
                    setattr(module, name, QuantLinear(child.weight, child.bias, bits))
            elif isinstance(child, DenseFFN):
                fits = _fits(child.gate_up.flatten(0, 1), bits) and _fits(child.down, bits)
                if fits:
                    setattr(module, name, QuantFFN(child.gate_up, child.down, bits))
            elif isinstance(child, MoEFFN):
                fits = _fits(child.gate_up[0].flatten(0, 1), bits) and _fits(child.down[0].T, bits)
                if fits:
                    child.experts = QuantExperts(child, bits)
                    del child.gate_up, child.down
            else:
                continue
            left += not fits
    return before, _bytes(model), left


def _fits(weight: Tensor, bits: Bits) -> bool:
    return bits == "int8" or (weight.shape[1] % GROUP == 0 and weight.shape[0] % ROWS == 0)


def _absorbed(module: nn.Module, name: str) -> bool:
    return isinstance(module, LatentAttention) and name == "kv_up"


def _bytes(model: Transformer) -> int:
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
