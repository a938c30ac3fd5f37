"""Speculative decoding: guess a few tokens ahead, compute them all at once, keep those that were right.

    n-gram   what followed the last time that the newest tokens stood in the text     (prompt lookup)
    draft    what a smaller model writes
    MTP      what the model's own prediction module writes (DeepSeek-V3, arXiv 2412.19437, section 2.2): from the
             hidden state of token t and the embedding of token t+1 it predicts token t+2; of its own output, further

Token i of a request is drawn with the uniform number u(seed, i) whatever the batch is, so a guess is right where
it equals the token that is drawn: nothing is accepted by chance, and the text is token for token the one without
speculation. Guesses are drawn with the same u, which makes them agree more often than the two distributions'
likeliest tokens would.

Left out: trees of guesses; guessing with layers whose state can't be taken back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from trivet.config import UserError
from trivet.engine.rows import Rows
from trivet.engine.sampling import sample
from trivet.model import Transformer
from trivet.model.cache import LayerCache
from trivet.spec import GatedDeltaNet, LayerSpec, Lightning

LONGEST_NGRAM = 3  # tokens that must have stood there before; then fewer
PIECE = 1_024  # prompt tokens that a draft model reads at a time


class Drafter(Protocol):
    """Guesses go into a row's tokens, right behind those that are known; rows.guessed counts them."""

    ahead: int

    @property
    def mixers(self) -> Sequence[nn.Module]:
        """Layers whose caches stand in the rows behind the model's."""
        ...

    def look_ahead(
        self, rows: Rows, part: slice, start: np.ndarray, counts: np.ndarray, hidden: Tensor, ready: np.ndarray
    ) -> None:
        """Of a part of the rows the model computed counts[i] tokens from position start[i] on, hidden [n,T,D], that
        have turned out to be right. Guess what follows in those of them that are `ready` [n]."""
        ...


class NGram:
    """Looks for the newest tokens further up in the row."""

    mixers: Sequence[nn.Module] = ()

    def __init__(self, ahead: int) -> None:
        self.ahead = ahead

    def look_ahead(
        self, rows: Rows, part: slice, start: np.ndarray, counts: np.ndarray, hidden: Tensor, ready: np.ndarray
    ) -> None:
        for row in np.flatnonzero(ready) + part.start:
            known = int(rows.wanted[row])
            found = _followed(rows.tokens[row, :known], min(self.ahead, rows.columns - known))
            rows.tokens[row, known : known + len(found)] = found
            rows.guessed[row] = len(found)


def _followed(tokens: np.ndarray, most: int) -> np.ndarray:
    """What followed the newest n-gram the last time that it stood there, longest n first; empty if it never did."""
    for n in range(min(LONGEST_NGRAM, len(tokens) - 1), 0, -1):
        windows = np.lib.stride_tricks.sliding_window_view(tokens[:-1], n)
        hits = np.flatnonzero((windows == tokens[-n:]).all(-1))
        if len(hits):
            return tokens[hits[-1] + n : hits[-1] + n + most]
    return tokens[:0]


class Draft:
    """A smaller model over the same vocabulary writes ahead, in caches of its own that catch up as rows do."""

    def __init__(self, model: Transformer, target: Transformer, ahead: int) -> None:
        if model.spec.vocab_size != target.spec.vocab_size:
            raise UserError(
                f"A draft model must know the same tokens: it has {model.spec.vocab_size:,}, the model "
                f"{target.spec.vocab_size:,}."
            )
        _takes_back(model.spec.layers, "A draft model")
        self.model, self.ahead = model, ahead
        self.mixers: list[nn.Module] = [layer.mixer for layer in model.layers]  # type: ignore[misc]

    def look_ahead(
        self, rows: Rows, part: slice, start: np.ndarray, counts: np.ndarray, hidden: Tensor, ready: np.ndarray
    ) -> None:
        which = np.flatnonzero(ready)
        caches = [cache.view(part) for cache in rows.extra]
        newest = hidden.new_zeros(len(which), self.model.spec.d_model)
        while (lacking := (rows.wanted[part] - rows.drafted[part]) * ready).any():
            count = np.minimum(lacking, PIECE)
            state = self._read(rows, part, rows.drafted[part], count, caches)
            fed = count[which] > 0
            newest[torch.from_numpy(np.flatnonzero(fed))] = state[which[fed], count[which[fed]] - 1]
            rows.drafted[part] += count

        def step(state: Tensor, at: np.ndarray) -> Tensor:
            first, one = np.zeros(len(ready), np.int64), ready.astype(np.int64)
            first[which] = at
            return self._read(rows, part, first, one, caches)[which, 0]

        if len(which):
            _chain(rows, which + part.start, newest, self.ahead, self.model, step)

    def _read(
        self, rows: Rows, part: slice, start: np.ndarray, counts: np.ndarray, caches: Sequence[LayerCache]
    ) -> Tensor:
        """Feed counts[i] tokens of each row of the part, from start[i] on -> hidden [n,T,D]."""
        tokens, positions, span = rows.read_on(part, start, counts)
        out: Tensor = self.model(tokens, positions, caches, span)
        return out


class MTP:
    """The model's first prediction module, and then again on its own output."""

    def __init__(self, model: Transformer, ahead: int) -> None:
        if not model.mtp:
            raise UserError("This model has no multi-token-prediction module to guess with; n-grams need none.")
        _takes_back(model.spec.layers[-1:], "A prediction module")
        self.model, self.ahead = model, ahead
        self.mixers: list[nn.Module] = [model.mtp[0].layer.mixer]  # type: ignore[union-attr,list-item]

    def look_ahead(
        self, rows: Rows, part: slice, start: np.ndarray, counts: np.ndarray, hidden: Tensor, ready: np.ndarray
    ) -> None:
        (cache,) = (cache.view(part) for cache in rows.extra)
        which = np.flatnonzero(ready)
        # The hidden state of t goes with token t+1, and stands at position t.
        following, positions, span = rows.read_on(part, start, counts, shift=1)
        state = self.model.mtp_step(hidden[:, : following.shape[1]], following, positions, cache, span)

        def step(state: Tensor, at: np.ndarray) -> Tensor:
            before = hidden.new_zeros(len(ready), 1, hidden.shape[-1])
            before[which, 0] = state
            first, one = np.zeros(len(ready), np.int64), ready.astype(np.int64)
            first[which] = at - 1
            following, positions, span = rows.read_on(part, first, one, shift=1)
            return self.model.mtp_step(before, following, positions, cache, span)[which, 0]

        if len(which):
            _chain(rows, which + part.start, state[which, counts[which] - 1], self.ahead, self.model, step)


def _chain(
    rows: Rows,
    which: np.ndarray,
    state: Tensor,
    ahead: int,
    head: Transformer,
    step: Callable[[Tensor, np.ndarray], Tensor],
) -> None:
    """Draw a guess from each row's state [n,D], let `step` read it, and so on. step: (state, position of the guess)."""
    known, room = rows.wanted[which], rows.columns - rows.wanted[which]
    rows.guessed[which] = np.minimum(ahead, room)
    settings = rows.settings[torch.from_numpy(which).to(state.device)]
    for depth in range(ahead):
        index = torch.from_numpy(known - rows.prompt_length[which] + depth).to(state.device)
        tokens, _, _ = sample(head.logits(state), settings, index)
        at = np.minimum(known + depth, rows.columns - 1)  # a row without room keeps its last guess there, unused
        rows.tokens[which, at] = tokens.cpu().numpy()
        if depth + 1 < ahead:
            state = step(state, at)


def _takes_back(layers: Sequence[LayerSpec], who: str) -> None:
    for layer in layers:
        if isinstance(layer.mixer, Lightning | GatedDeltaNet):
            raise UserError(f"{who} with {layer.mixer.kind} layers can't guess: what it has read can't be taken back.")
