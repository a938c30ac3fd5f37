"""Muon for matrices, AdamW for the rest, and the learning rate over a run.

Muon (Jordan 2024, kellerjordan.github.io/posts/muon): the Nesterov momentum of a matrix is replaced
by the nearest semi-orthogonal matrix, U V^T of its singular value decomposition, so that every
direction moves by the same amount. Five Newton-Schulz steps

    X <- a X + (b A + c A^2) X,   A = X X^T,   (a, b, c) = (3.4445, -4.7750, 2.0315)

bring every singular value to somewhere in 0.7..1.2, which is near enough. The update is scaled by
sqrt(max(1, rows/columns)). Weight decay is decoupled: w <- (1 - lr decay) w.

AdamW (arXiv 1711.05101) takes embeddings, norms and biases; only those with two or more dimensions
decay. Small models have many small matrices, so matrices of one shape (or its transpose) go through
Newton-Schulz together, and everything elementwise is one foreach call. Together are at most `STACK`
numbers, or one matrix: what an update holds beside the moments does not grow with the depth.

With several processes every update is one of what each holds (`parallel.py`); only matrices that are cut
through are put together first, each on one process. Left out: per-parameter learning rates.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import compress
from typing import Literal

import torch
from torch import Tensor

from trivet.config import UserError
from trivet.train.exchange import Exchange
from trivet.train.parallel import Part, Parts, local

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
# Numbers that Newton-Schulz works on at a time: enough to fill a GPU; a CPU is faster in memory that it has just used.
STACK = {"cpu": 2**22, "cuda": 2**24}


class Optimizer:
    """`groups` as model.optimizer_groups() gives them. A parameter without a gradient stays."""

    def __init__(
        self,
        groups: Mapping[str, Mapping[str, Tensor]],
        muon_lr: float = 0.02,
        adam_lr: float = 3e-3,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        parts: Parts | None = None,
    ):
        """parts: how the parameters are divided over processes; None: not at all."""
        self.parts: Parts = parts or {}
        self.matrices, self.others = dict(groups["matrices"]), dict(groups["others"])
        self.muon_lr, self.adam_lr, self.weight_decay = muon_lr, adam_lr, weight_decay
        self.momentum, self.betas, self.eps = momentum, betas, eps
        self.steps = 0
        self._momenta = {name: torch.zeros_like(local(p)) for name, p in self.matrices.items()}
        self._means = {name: torch.zeros_like(local(p)) for name, p in self.others.items()}
        self._squares = {name: torch.zeros_like(local(p)) for name, p in self.others.items()}

    @torch.no_grad()
    def step(self, lr_scale: float = 1.0) -> None:
        """One update from the parameters' gradients, with both learning rates times `lr_scale`."""
        self.steps += 1
        self._muon(self.muon_lr * lr_scale)
        self._adamw(self.adam_lr * lr_scale)

    def collect_gradients(self) -> None:
        """To be called when gradients are whole, before they are clipped: see offload.py."""

    def zero_grad(self) -> None:
        for p in self.parameters():
            p.grad = None

    def parameters(self) -> list[Tensor]:
        return [*self.matrices.values(), *self.others.values()]

    def named(self) -> dict[str, Tensor]:
        return self.matrices | self.others

    def _muon(self, lr: float) -> None:
        names = [name for name, p in self.matrices.items() if p.grad is not None]
        if not names:
            return
        params, grads = self._params_and_grads(self.matrices, names)
        momenta = [self._momenta[name] for name in names]
        torch._foreach_lerp_(momenta, grads, 1 - self.momentum)
        if self.weight_decay:
            torch._foreach_mul_(params, 1 - lr * self.weight_decay)
        cut = [name in self.parts and self.parts[name].cuts_matrix for name in names]
        here = [not through for through in cut]
        self._whole_matrices(*(list(compress(x, here)) for x in (params, grads, momenta)), lr=lr)
        if any(cut):
            parts = [self.parts[name] for name in compress(names, cut)]
            self._cut_matrices(parts, *(list(compress(x, cut)) for x in (params, grads, momenta)), lr=lr)

    def _whole_matrices(self, *tensors: list[Tensor], lr: float) -> None:
        """tensors: parameters, gradients and momenta."""
        cut = [[part for x in some for part in matrices(x)] for some in tensors]
        for stack in stacks(cut[0]):
            params, grads, momenta = ([parts[i] for i in stack] for parts in cut)
            ahead = torch._foreach_lerp(grads, momenta, self.momentum)  # Nesterov
            torch._foreach_add_(params, self._orthogonal(ahead), alpha=-lr)
            del ahead

    def _cut_matrices(self, parts: list[Part], *tensors: list[Tensor], lr: float) -> None:
        """The same for matrices that lie on several processes: a few at a time, of which each process takes some."""
        sizes, group = [math.prod(part.whole) for part in parts], parts[0].group
        for some in turns(sizes, group.size(), tensors[0][0].device):
            params, grads, momenta = ([x[i] for i in some] for x in tensors)
            exchange = Exchange(torch._foreach_lerp(grads, momenta, self.momentum), [parts[i] for i in some])
            wholes = exchange.there()
            flat = [part for whole in wholes for part in matrices(whole)]
            for stack in stacks(flat):
                torch._foreach_copy_([flat[i] for i in stack], self._orthogonal([flat[i] for i in stack]))
            torch._foreach_add_(params, exchange.back(wholes), alpha=-lr)

    def _orthogonal(self, updates: Sequence[Tensor]) -> list[Tensor]:
        return orthogonalize(updates)

    def _adamw(self, lr: float) -> None:
        names = [name for name, p in self.others.items() if p.grad is not None]
        if not names:
            return
        params, grads = self._params_and_grads(self.others, names)
        means, squares = [self._means[n] for n in names], [self._squares[n] for n in names]
        beta1, beta2 = self.betas
        decaying = [p for p in params if p.ndim >= 2]
        if self.weight_decay and decaying:
            torch._foreach_mul_(decaying, 1 - lr * self.weight_decay)
        torch._foreach_lerp_(means, grads, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, grads, grads, 1 - beta2)
        scale = torch._foreach_sqrt(squares)
        torch._foreach_div_(scale, math.sqrt(1 - beta2**self.steps))
        torch._foreach_add_(scale, self.eps)
        torch._foreach_addcdiv_(params, means, scale, -lr / (1 - beta1**self.steps))

    def state_dict(self) -> dict[str, Tensor]:
        state = {"steps": torch.tensor(self.steps)}
        for kind, tensors in self._tables().items():
            state |= {f"{kind}.{name}": tensor for name, tensor in tensors.items()}
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        mine = self.state_dict()
        for name in sorted(mine.keys() ^ state.keys()):
            where = "missing from" if name in mine else "unexpected in"
            raise UserError(f"{name!r} is {where} the stored optimizer state: it belongs to another model.")
        for name, tensor in mine.items():
            if tensor.shape != state[name].shape:
                raise UserError(
                    f"Optimizer state {name!r} has shape {list(state[name].shape)}, "
                    f"this model needs {list(tensor.shape)}."
                )
            tensor.copy_(state[name])
        self.steps = int(state["steps"])

    def _params_and_grads(self, table: Mapping[str, Tensor], names: Sequence[str]) -> tuple[list[Tensor], list[Tensor]]:
        grads = _grads([table[name] for name in names])
        return [local(table[name]) for name in names], [local(g) for g in grads]

    def _tables(self) -> dict[str, dict[str, Tensor]]:
        return {"momentum": self._momenta, "mean": self._means, "square": self._squares}


def matrices(x: Tensor) -> list[Tensor]:
    """Views [n, rows, columns] of x [..., rows, columns], each of as many numbers as a stack has or of one matrix."""
    if not x.numel():  # a process may hold nothing of it
        return []
    if x.ndim > 3:  # one by one: a tensor that was read from a checkpoint need not be contiguous
        return [part for some in x for part in matrices(some)]
    flat = x if x.ndim == 3 else x.unsqueeze(0)
    return list(flat.split(max(1, most_numbers(x.device) // flat[0].numel())))


def most_numbers(device: torch.device) -> int:
    return STACK.get(device.type, STACK["cuda"])


def stacks(parts: Sequence[Tensor]) -> Iterator[list[int]]:
    """Which of the parts [n, rows, columns] go together: of one shape or its transpose, not too many numbers."""
    open_: dict[tuple[int, int, torch.dtype, torch.device], list[int]] = {}
    for i, x in enumerate(parts):
        short, long = sorted(x.shape[-2:])
        key = (short, long, x.dtype, x.device)
        stack = open_.setdefault(key, [])
        if stack and sum(parts[j].numel() for j in stack) + x.numel() > most_numbers(x.device):
            yield stack
            stack = open_[key] = []
        stack.append(i)
    yield from open_.values()


def turns(sizes: Sequence[int], processes: int, device: torch.device) -> Iterator[list[int]]:
    """Which of many matrices go together, so that each process gets about as much as Newton-Schulz works on at a time."""
    some: list[int] = []
    for i, size in enumerate(sizes):
        if len(some) >= processes and sum(sizes[j] for j in some) + size > processes * most_numbers(device):
            yield some
            some = []
        some.append(i)
    yield some


def orthogonalize(updates: Sequence[Tensor]) -> list[Tensor]:
    """Muon's update of tensors [n, rows, columns] of one shape or its transpose, by one Newton-Schulz."""
    lying = [_lie_down(u) for u in updates]
    done = newton_schulz(torch.cat(lying)).to(updates[0].dtype)  # [matrices, short, long]
    result = []
    for u, part in zip(updates, done.split([len(x) for x in lying]), strict=True):
        rows, columns = u.shape[-2:]
        result.append((part * math.sqrt(rows / columns)).mT if rows > columns else part)
    return result


def newton_schulz(x: Tensor, steps: int = 5) -> Tensor:
    """Nearly the nearest semi-orthogonal matrix of each [short, long] matrix of a stack."""
    a, b, c = NEWTON_SCHULZ
    if x.is_cuda:
        x = x.bfloat16()  # rounding is far below the iteration's own error; fp32 there is 10x slower
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = torch.bmm(x, x.mT)
        poly = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, poly, x, beta=a)
    return x


def clip(parameters: Iterable[Tensor], most: float) -> Tensor:
    """Scale all gradients so that their norm together is at most `most`; the norm before that."""
    grads = [p.grad for p in parameters if p.grad is not None]
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
    torch._foreach_mul_(grads, (most / (norm + 1e-6)).clamp(max=1.0))
    return norm


def schedule(
    step: int,
    steps: int,
    warmup: int = 0,
    decay_share: float = 0.0,
    final: float = 0.0,
    shape: Literal["linear", "cosine"] = "linear",
) -> float:
    """Factor of the learning rate at step 0..steps-1: up over `warmup` steps, flat, then down to
    `final` over the last `decay_share` of the run."""
    rise = min(1.0, (step + 1) / warmup) if warmup else 1.0
    decay = round(steps * decay_share)
    if step < steps - decay:
        return rise
    done = (step - (steps - decay)) / decay
    left = 1 - done if shape == "linear" else (1 + math.cos(math.pi * done)) / 2
    return min(rise, final + (1 - final) * left)


def _grads(params: Sequence[Tensor]) -> list[Tensor]:
    return [p.grad for p in params if p.grad is not None]


def _lie_down(x: Tensor) -> Tensor:
    return x.mT if x.shape[-2] > x.shape[-1] else x
