"""What changes a row's logits before a token is drawn: penalties, biases, grammars. Rows that ask for none cost nothing.

    repetition   l <- l / p where l > 0, l p elsewhere, for tokens of prompt and answer      (CTRL, arXiv 1909.05858)
    presence     l <- l - a for tokens of the answer;  frequency  l <- l - b count(token)    (as OpenAI's API)
    bias         l <- l + c for tokens that are named
    grammar      l <- -inf for tokens that can't follow

The model's own distribution is kept beside it: raw logprobs are taken before any of this.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from trivet.engine.grammar import Grammars
from trivet.engine.request import Live
from trivet.messages import Sampling


def steers(s: Sampling) -> bool:
    """Whether a request asks for anything here."""
    plain = s.repetition_penalty == 1 and s.presence_penalty == 0 and s.frequency_penalty == 0
    return not plain or bool(s.logit_bias) or s.grammar is not None


def steer(
    logits: Tensor,
    lives: Sequence[Live],
    places: Sequence[int],
    tokens: Sequence[np.ndarray],
    grammars: Grammars | None,
    thinks: Sequence[int],
) -> Tensor:
    """The logits [B,V], changed for `lives` (at `places` in B; tokens: its prompt and what it wrote).

    thinks: for each of them, the token that may open a thought here whatever its grammar says, -1 for none, and
    -2 while a thought is open.
    """
    changed = logits.float().clone()
    for live, at, known in zip(lives, places, tokens, strict=True):
        _penalise(changed[at], live.request.sampling, known, len(live.request.prompt))
    _bias(changed, lives, places)
    bound = [i for i, live in enumerate(lives) if live.matcher is not None and thinks[i] > -2]
    if bound:
        assert grammars is not None
        allowed = grammars.allowed([lives[i].matcher for i in bound], logits.device)
        for row, i in enumerate(bound):
            if thinks[i] >= 0:
                allowed[row, thinks[i]] = True
        at_rows = torch.tensor([places[i] for i in bound], device=logits.device)
        changed[at_rows] = changed[at_rows].masked_fill(~allowed, float("-inf"))
    return changed


def _penalise(row: Tensor, s: Sampling, known: np.ndarray, prompt: int) -> None:
    """One row's penalties, in place."""
    if s.repetition_penalty != 1:
        seen = torch.from_numpy(np.unique(known)).to(row.device)
        value = row[seen]
        row[seen] = torch.where(value > 0, value / s.repetition_penalty, value * s.repetition_penalty)
    if (s.presence_penalty or s.frequency_penalty) and len(known) > prompt:
        written, counts = np.unique(known[prompt:], return_counts=True)
        amount = s.presence_penalty + s.frequency_penalty * counts
        row[torch.from_numpy(written).to(row.device)] -= torch.from_numpy(amount).to(row)


def _bias(logits: Tensor, lives: Sequence[Live], places: Sequence[int]) -> None:
    """All rows' biases, in place."""
    named = [(at, *bias) for live, at in zip(lives, places, strict=True) for bias in live.request.sampling.logit_bias]
    if named:
        row, token, value = (torch.tensor(each, device=logits.device) for each in zip(*named, strict=True))
        logits.index_put_((row, token), value.to(logits.dtype), accumulate=True)
