"""Which products of RL are in bf16: all but the routers' and the head's, whatever `precision` says.

    trainer   autocast: products in bf16; weights, optimizer and the stream between layers in fp32
    sampler   a copy of the weights in bf16, made anew for every batch

A token's log-probability is a difference of large logits, so the head's product is where rounding hurts first:
MiniMax-M1 (arXiv 2506.13585) found that the probabilities of trainer and sampler correlate better (0.997 instead of
0.987) once the head is fp32 on both sides. A router's rounding flips choices. Both are small products.
`fp32_head = false` rounds the head, too, to see the difference in `mismatch/*`.
"""

from __future__ import annotations

import copy

import torch
from torch import nn

from trivet.model import Transformer
from trivet.model.ffn import MoEFFN
from trivet.rl.config import RLConfig


def products(config: RLConfig, device: torch.device) -> torch.autocast:
    """The trainer's products in the precision that is asked for."""
    return torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16")


def head_products(config: RLConfig, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16" and not config.fp32_head)


def sampling_model(model: Transformer, config: RLConfig) -> Transformer:
    """The model that the engine runs: itself in fp32, else a copy in bf16, which shares what stays as it is."""
    if config.precision == "fp32":
        return model
    routers = {name: module.router for name, module in model.named_modules() if isinstance(module, MoEFFN)}
    rounded = copy.deepcopy(model).bfloat16()
    for name, router in routers.items():
        rounded.get_submodule(name).router = nn.Parameter(router.detach(), requires_grad=False)
    if config.fp32_head:  # also where the head is the embedding: then the copy has both
        rounded.head = nn.Parameter(model.head_weight.detach(), requires_grad=False)
    return rounded
