"""One run on several processes, which torchrun starts: the same numbers as on one, in less memory and time.

    world = replicas x expert_shards x shards,        rank = (replica, expert shard, shard)

Every process computes its part of a step's rows (`data.share`). Of each layer it holds

    1 / shards of every parameter          FSDP (arXiv 2304.11277), torch's `fully_shard`: a layer is gathered
                                           when its turn comes, its gradient is summed to where it belongs
    1 / expert_shards of the experts       expert parallelism (`model/experts.py`), then FSDP on these

and what is held several times (replicas, and outside of the experts also expert shards) is summed over its
holders. One divisor holds for the whole step, the target tokens of all processes, so gradients are *summed*,
never averaged: a mean of means would let a token count more the fewer tokens its process has.

A parameter is divided along its first dimension that shards divide evenly, else unevenly along the first.
bf16 is autocast, as on one process: gathered are fp32 numbers, so routers and norms stay exact.

Tested with gloo on CPUs; NCCL takes the same calls. Left out: tensor, sequence and pipeline parallelism;
reading a start in parts (each process reads all of it into its own host memory, then keeps its part);
communication in bf16; summing over replicas once a step (it is done after every microbatch).
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trivet.config import UserError
from trivet.model import Transformer
from trivet.model.experts import Experts, plain_name, spread_experts
from trivet.model.ffn import MoEFFN
from trivet.model.lora import Size, adapters, attach

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


T = TypeVar("T")
# For one that plays longer than the others, or does alone what can't be shared out. One that died is noticed at once.
PATIENCE = timedelta(days=1)


@contextmanager
def processes(device: torch.device) -> Iterator[torch.device]:
    """Join the processes that torchrun started, if it did; yields this one's device."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield device
        return
    if device.type == "cuda":
        local, here = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if local >= here:
            raise UserError(
                f"Process {local} of this machine has no GPU: there are {here}. Start {here} with "
                "torchrun --nproc-per-node, or give --device cpu."
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    elif device.type != "cpu":
        raise UserError(f"Several processes train on cuda or cpu, not on {device.type}: give --device, or start one.")
    try:
        # What is said between steps (stop, save) is said by gloo, so that no GPU has to be waited for.
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    except (ValueError, RuntimeError) as e:
        raise UserError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but the processes did not find each other ({str(e).splitlines()[0]}): "
            "start them with torchrun, or unset WORLD_SIZE."
        ) from None
    try:
        yield device
    except RuntimeError as e:
        if "gloo/transport" not in str(e):  # where it is noticed that a process died
            raise
        raise UserError(
            f"The connection to another of the {os.environ['WORLD_SIZE']} processes was lost: see what that one said last. The same "
            "command goes on from the last saved state."
        ) from None
    finally:
        dist.destroy_process_group()


@dataclass(frozen=True)
class Ranks:
    """This process among the others. The default is one process, for which everything here does nothing."""

    rank: int = 0
    world: int = 1
    shards: int = 1
    expert_shards: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes logs."""
        return self.rank == 0

    def sum(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Each tensor summed over all processes, in one go."""
        if self.world == 1:
            return list(tensors)
        flat = torch.cat([t.flatten() for t in tensors])
        dist.all_reduce(flat)
        parts = flat.split([t.numel() for t in tensors])
        return [part.view_as(t) for part, t in zip(parts, tensors, strict=True)]

    def any(self, *said: bool) -> list[bool]:
        """For each flag, whether any process raised it: what all of them then act on."""
        if self.world == 1:
            return list(said)
        flags = torch.tensor(said, dtype=torch.int32)
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        return [bool(flag) for flag in flags.tolist()]

    def gather(self, value: T) -> list[T]:
        """What each process has, in their order; tensors in it must be on the CPU."""
        if self.world == 1:
            return [value]
        values = [value] * self.world
        dist.all_gather_object(values, value)
        return values

    def sum_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Of parameters that every process holds whole. One that has none anywhere stays without."""
        if self.world == 1:
            return
        there = self.any(*(p.grad is not None for p in parameters))
        learnt = [p for p, somewhere in zip(parameters, there, strict=True) if somewhere]
        sums = self.sum([torch.zeros_like(p) if p.grad is None else p.grad for p in learnt])
        for p, grad in zip(learnt, sums, strict=True):
            p.grad = grad


ALONE = Ranks()


def first() -> bool:
    """Whether this process writes what is written once."""
    return not dist.is_initialized() or dist.get_rank() == 0


def host(device: torch.device) -> torch.device:
    """Where to load a model that is about to be trained: a device need not hold all of one that will be divided."""
    return torch.device("cpu") if dist.is_initialized() else device


def ranks_of(shards: int, expert_shards: int, of: str = "train") -> Ranks:
    """This process's place under the settings `of` a run; shards = 0: as many as there are processes for.

    Raises UserError where the number of processes is no multiple of shards x expert shards.
    """
    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    block = max(shards, 1) * expert_shards
    if world % block:
        experts = f" and {of}.expert_shards = {expert_shards} need" if of == "train" else " needs"
        started = f"{world} processes were started" if world > 1 else "one process was started (torchrun starts more)"
        raise UserError(f"{of}.shards = {shards}{experts} a multiple of {block} processes; {started}.")
    return Ranks(rank, world, shards or world // expert_shards, expert_shards)


# ----------------------------------------------------------------------------------------- the division
@dataclass(frozen=True)
class Part:
    """Which part of a parameter this process holds: all of it but for `dim`, and for experts dimension 0."""

    whole: tuple[int, ...]  # its shape on one process
    start: tuple[int, ...]  # where the part begins
    dim: int  # the dimension that FSDP divides
    sizes: tuple[int, ...]  # along it, of the processes of `group`
    copies: int  # processes that hold this same part
    writes: bool  # whether this is the first of them
    group: dist.ProcessGroup  # the processes that FSDP divides it over

    @property
    def cuts_matrix(self) -> bool:
        """Whether a matrix (the last two dimensions) lies on several processes."""
        return self.group.size() > 1 and self.dim >= len(self.whole) - 2


Parts = Mapping[str, Part]


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, which may be divided. Writing to it writes to the tensor."""
    if not dist.is_initialized():
        return tensor
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def divide(model: Transformer, ranks: Ranks, device: torch.device) -> dict[str, Part]:
    """Leave on `device` only this process's part of the model; -> the parts by the parameters' plain names.

    All processes must hold the same whole model before. Its parameters are DTensors afterwards, and it
    computes what it computed, if all processes call it together.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard
    from torch.distributed.tensor import Shard

    check_experts(model, ranks)
    shards, experts = ranks.shards, ranks.expert_shards
    copies, replicas = ranks.world // shards, ranks.world // (shards * experts)
    dense = init_device_mesh(device.type, (copies, shards), mesh_dim_names=("copies", "shards"))
    sparse = init_device_mesh(device.type, (replicas, experts, shards), mesh_dim_names=("copies", "experts", "shards"))

    def cut(module: nn.Module, mesh: DeviceMesh) -> None:
        fully_shard(module, mesh=mesh, shard_placement_fn=lambda p: Shard(dim_to_cut(p.shape, shards)))

    for p in model.parameters():
        p.data = p.data.contiguous()
    for layer in [*model.layers, *(module.layer for module in model.mtp)]:
        if experts > 1 and isinstance(layer.ffn, MoEFFN):
            cut(spread_experts(layer.ffn, sparse.get_group("experts")), sparse["copies", "shards"])
        cut(layer, dense)
    cut(model, dense)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no other, and 1.0 needs none
    return {plain_name(name): _part(name, p, ranks, dense) for name, p in model.named_parameters()}


def dim_to_cut(shape: Sequence[int], shards: int) -> int:
    return next((d for d, n in enumerate(shape) if n % shards == 0), 0)


def _part(name: str, p: nn.Parameter, ranks: Ranks, mesh: DeviceMesh) -> Part:
    whole, spread = list(p.shape), plain_name(name) != name
    dim = dim_to_cut(whole, ranks.shards)
    _, expert, shard = place(ranks)
    step = math.ceil(whole[dim] / ranks.shards)  # as torch.chunk
    sizes = [min(step, max(0, whole[dim] - i * step)) for i in range(ranks.shards)]
    start = [0] * len(whole)
    start[dim] = sum(sizes[:shard])
    block = ranks.shards
    if spread:
        start[0] += expert * whole[0]
        whole[0] *= ranks.expert_shards
        block *= ranks.expert_shards
    return Part(
        tuple(whole), tuple(start), dim, tuple(sizes), ranks.world // block, ranks.rank < block, mesh.get_group("shards")
    )  # fmt: skip


def place(ranks: Ranks) -> tuple[int, int, int]:
    """(replica, expert shard, shard) of this process."""
    rest, shard = divmod(ranks.rank, ranks.shards)
    return *divmod(rest, ranks.expert_shards), shard


def check_experts(model: Transformer, ranks: Ranks) -> None:
    if ranks.expert_shards == 1:
        return
    counts = {m.spec.experts for m in model.modules() if isinstance(m, MoEFFN)}
    if not counts:
        raise UserError(
            f"train.expert_shards = {ranks.expert_shards} needs experts, and this model has none: leave it out."
        )
    for experts in sorted(counts):
        if experts % ranks.expert_shards:
            fit = ", ".join(str(n) for n in range(2, experts + 1) if experts % n == 0)
            raise UserError(
                f"train.expert_shards = {ranks.expert_shards} does not divide {experts} experts; take one of {fit}."
            )


@torch.no_grad()
def gathered(model: Transformer, everywhere: bool = False) -> Transformer | None:
    """The whole model, in host memory, on the first process or everywhere, None on the others; one that is not divided as it is."""
    if not dist.is_initialized():
        return model
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    if not isinstance(model, FSDPModule):
        return model
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, DTensor):
            tensor = tensor.full_tensor()
            owner = model.get_submodule(name.rpartition(".")[0])
            if isinstance(owner, Experts):
                others = [torch.empty_like(tensor) for _ in range(owner.group.size())]
                dist.all_gather(others, tensor, group=owner.group)
                tensor = torch.cat(others)
        if everywhere or dist.get_rank() == 0:
            tensors[plain_name(name)] = tensor.cpu()
    if not tensors:
        return None
    with torch.device("meta"):
        whole = Transformer(model.spec, seed=None)
        attach(whole, {at: Size(a.rank, a.alpha, a.rslora) for at, a in adapters(model).items()})
    whole.load_state_dict(tensors, assign=True)
    return whole


def clip(parameters: Mapping[str, Tensor], parts: Parts, ranks: Ranks, most: float) -> Tensor:
    """As `optim.clip`, for gradients that are divided: each number counts once, whoever holds it."""
    held = {name: local(p.grad) for name, p in parameters.items() if p.grad is not None}
    norms = torch.stack(torch._foreach_norm(list(held.values())))
    shares = torch.tensor([1 / parts[name].copies for name in held], device=norms.device)
    (square,) = ranks.sum([(norms.square() * shares).sum()])
    norm = square.sqrt()
    torch._foreach_mul_(list(held.values()), (most / (norm + 1e-6)).clamp(max=1.0))
    return norm
