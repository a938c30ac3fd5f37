"""The basis of a low-rank cache: the numbers of a latent that its layer's keys and values need most, on texts of the
kind that the model will write.

    R = (W^T W)^1/2,  W = W_ukv        how much a layer reads of each direction of its latents           [C,C]
    U = eigenvectors of R E[c c^T] R, the largest eigenvalue first
    z = c R U,   c ~ z[:r] (U^T R^-1)[:r]

So of all r numbers these lose the least of W c, in squares: the PCA of the keys and values, not of the latents, whose large
directions a layer may hardly read (measured in docs/LOG.md).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trivet.chat import Chat
from trivet.config import UserError
from trivet.engine.engine import Engine
from trivet.engine.request import Request
from trivet.messages import Message, Sampling
from trivet.model import Transformer
from trivet.model.compressed import Basis
from trivet.model.mla import LatentAttention

LEAST_READ = 1e-9  # of the direction that is read the most: what is not read at all still needs an inverse


@torch.no_grad()
def calibrate(model: Transformer, texts: Sequence[Sequence[int]]) -> list[Basis | None]:
    """A basis for each layer with a latent, from its latents on texts (token ids, one forward pass each)."""
    mixers = [layer.mixer for layer in model.layers]
    squares = {
        i: torch.zeros(m.spec.kv_rank, m.spec.kv_rank, dtype=torch.float64)
        for i, m in enumerate(mixers) if isinstance(m, LatentAttention)
    }  # fmt: skip
    if not squares or not any(texts):
        raise UserError(
            "A low-rank cache is calibrated on the latents of MLA layers over texts; one of them is missing."
        )

    def note(layer: int, latent: Tensor) -> None:
        c = latent.detach().flatten(0, -2).double().cpu()
        squares[layer] += c.T @ c

    def hook(layer: int) -> object:
        return lambda module, args, out: note(layer, out)

    hooks = [mixers[i].kv_norm.register_forward_hook(hook(i)) for i in squares]  # type: ignore[union-attr,arg-type]
    try:
        for text in texts:
            if text:
                model(torch.tensor([list(text)], device=model.embed.device))
    finally:
        for each in hooks:
            each.remove()
    read = {i: mixers[i].kv_up.matrix().double().cpu() for i in squares}  # type: ignore[union-attr,operator]
    return [_basis(squares[i], read[i]) if i in squares else None for i in range(len(mixers))]


def _basis(squares: Tensor, read: Tensor) -> Basis:
    """squares: sum of c c^T [C,C]; read: W_ukv [.,C]."""
    weights, directions = torch.linalg.eigh(read.T @ read)
    weights = weights.clamp_min(LEAST_READ * weights[-1])
    root, inverse = (directions * weights**power @ directions.T for power in (0.5, -0.5))
    vectors = torch.linalg.eigh(root @ squares @ root).eigenvectors.flip(-1)  # the largest first
    return Basis(root @ vectors, vectors.T @ inverse)


def written(model: Transformer, chat: Chat, questions: Sequence[str], tokens: int, slots: int) -> list[tuple[int, ...]]:
    """Texts to calibrate on: what the model itself answers, at T = 1, in at most that many tokens."""
    engine = Engine(model, chat, len(questions), slots)
    asked = []
    for i, question in enumerate(questions):
        prompt = tuple(chat.render([Message("user", question)], generate=True).ids)
        asked.append(Request(prompt, Sampling(temperature=1.0, seed=i, max_tokens=tokens)))
    return [(*done.prompt_tokens, *done.tokens) for done in engine.generate(asked)]
