"""The basis of a low-rank cache: a PCA of the latents that a model has on texts of the kind that it will write.

    E = D^T = eigenvectors of the mean of c c^T, the largest eigenvalue first       [C,C] a layer

Keeping r coordinates then loses as little of the latents, in squares, as r numbers can.
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
    return [_basis(squares[i]) if i in squares else None for i in range(len(mixers))]


def _basis(squares: Tensor) -> Basis:
    vectors = torch.linalg.eigh(squares).eigenvectors.flip(-1)  # the largest first
    return Basis(vectors, vectors.T.contiguous())


def written(model: Transformer, chat: Chat, questions: Sequence[str], tokens: int, slots: int) -> list[tuple[int, ...]]:
    """Texts to calibrate on: what the model itself answers, at T = 1, in at most that many tokens."""
    engine = Engine(model, chat, len(questions), slots)
    asked = []
    for i, question in enumerate(questions):
        prompt = tuple(chat.render([Message("user", question)], generate=True).ids)
        asked.append(Request(prompt, Sampling(temperature=1.0, seed=i, max_tokens=tokens)))
    return [(*done.prompt_tokens, *done.tokens) for done in engine.generate(asked)]
