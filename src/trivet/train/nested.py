"""Nested ranks: an MLA model that is trained to do with the first numbers of its latents.

    in a step:  c -> (c_1 .. c_r, 0 .. 0),   r uniform in least..C in one half of the steps, r = C in the other

As in MatryoshkaKV (arXiv 2410.14731), which draws ranks the same way but trains a rotation alone. A cache of
rank by age (`engine/policy.py`) then loses less at equal bytes; without it, it works on any MLA model.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from trivet.config import UserError
from trivet.model import Transformer
from trivet.model.mla import LatentAttention


@contextmanager
def shortened(model: Transformer, least: int, seed: int) -> Iterator[int]:
    """In here every latent keeps its first r numbers, r by the seed; the others are zero and get no gradient. -> r

    least = 0: all of them, whatever the model. Raises UserError where it has no latents of `least` numbers.
    """
    mixers = [m for m in model.modules() if isinstance(m, LatentAttention)]
    ranks = [m.spec.kv_rank for m in mixers]
    if least and (not ranks or least > min(ranks)):
        raise UserError(
            f"train.nested_rank = {least} needs MLA layers with latents of at least that many numbers; "
            f"these have {sorted(set(ranks)) or 'none'}."
        )
    rng, whole = random.Random(seed), max(ranks, default=0)
    rank = rng.randint(least, whole) if least and rng.random() < 0.5 else whole

    def cut(module: nn.Module, args: object, latent: Tensor) -> Tensor:
        kept = latent.new_zeros(latent.shape[-1])
        kept[:rank] = 1
        return latent * kept

    hooks = [m.kv_norm.register_forward_hook(cut) for m in mixers if rank < whole]
    try:
        yield rank
    finally:
        for hook in hooks:
            hook.remove()
