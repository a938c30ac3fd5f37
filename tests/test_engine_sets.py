"""What a token was drawn from, as the engine records it: the set that truncation leaves, whatever else goes on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from test_engine_generate import CHAT, SLOTS, tags_often
from trivet.config import UserError
from trivet.engine import Engine, Request
from trivet.engine.sampling import Settings, truncate
from trivet.engine.speculate import NGram
from trivet.messages import Message, Sampling

HOW: list[dict[str, Any]] = [
    {"top_p": 0.8},
    {"top_k": 4},
    {"min_p": 0.1},
    {"top_p": 0.9, "min_p": 0.02, "temperature": 0.7},
]


def asked(keep: bool = True) -> list[Request]:
    return [
        Request((*CHAT.render([Message("user", f"{i}+1=")], generate=True).ids, *[CHAT.think_open_id] * (i % 2)),
                Sampling(seed=i, max_tokens=24, thinking=(None, 4)[i % 2], keep_sets=keep, **HOW[i % 4]))
        for i in range(12)
    ]  # fmt: skip


def test_sets_are_those_of_a_plain_pass_over_the_text() -> None:
    model = tags_often("gqa/dense mla/moe")
    forced = 0
    for request, done in zip(asked(), Engine(model, CHAT, 8, SLOTS).generate(asked()), strict=True):
        assert done.sets is not None
        ids, offsets = done.sets
        s, start = request.sampling, len(done.prompt_tokens)
        with torch.no_grad():
            logits = model.logits(model(torch.tensor([[*done.prompt_tokens, *done.tokens]])))[0, start - 1 : -1]
        row = Settings(*(torch.tensor([v]) for v in (s.temperature, s.top_p, s.top_k, s.min_p, s.seed)))
        cut = truncate(logits.log_softmax(-1) / s.temperature, row)
        logp = cut.log_softmax(-1)
        for i, (token, sampled) in enumerate(zip(done.tokens, done.sampled, strict=True)):
            found = ids[offsets[i] : offsets[i + 1]]
            if not sampled:
                forced += 1
                assert len(found) == 0
                continue
            assert set(found.tolist()) == set(cut[i].isfinite().nonzero().squeeze(-1).tolist())
            assert done.logprobs[i] == pytest.approx(logp[i, token].item(), abs=1e-4)
        assert len(offsets) == len(done.tokens) + 1 and offsets[-1] == len(ids) > 0
    assert forced > 3


def test_sets_change_nothing_and_nothing_changes_them() -> None:
    model = tags_often("gqa/dense*2")
    want = Engine(model, CHAT, 12, SLOTS).generate(asked())
    plain = Engine(model, CHAT, 12, SLOTS).generate(asked(keep=False))
    assert [c.tokens for c in want] == [c.tokens for c in plain] and all(c.sets is None for c in plain)
    alone = [Engine(model, CHAT, 1, SLOTS).generate([r])[0] for r in asked()]
    guessing = Engine(model, CHAT, 12, SLOTS, drafter=NGram(3)).generate(asked())
    paused = Engine(model, CHAT, 12, SLOTS)
    places = [paused.add(r) for r in asked()]
    found = dict(paused.step())
    for number in range(60):
        found |= dict(paused.step())
        paused.set_aside(places[number % 12])
    while paused.busy:
        found |= dict(paused.step())
    for others in (alone, guessing, [found[id] for id in places]):
        for a, b in zip(want, others, strict=True):
            assert a.tokens == b.tokens
            assert all(np.array_equal(x, y) for x, y in zip(a.sets or (), b.sets or (), strict=True))


def test_who_asks_is_told_and_no_other() -> None:
    model = tags_often()
    mixed = [replace(r, sampling=replace(r.sampling, keep_sets=i % 3 == 0)) for i, r in enumerate(asked())]
    whole = replace(mixed[0], sampling=Sampling(keep_sets=True, max_tokens=5))  # nothing is left out
    done = Engine(model, CHAT, 16, SLOTS).generate([*mixed, whole])
    assert [c.sets is not None for c in done] == [i % 3 == 0 for i in range(12)] + [False]


@pytest.mark.parametrize(
    "more", [{"temperature": 0.0}, {"repetition_penalty": 1.2}, {"presence_penalty": 0.5}, {"logit_bias": ((5, 1.0),)}]
)
def test_what_a_set_can_not_account_for_is_refused(more: dict[str, Any]) -> None:
    request = asked()[0]
    with pytest.raises(UserError, match="keep_sets needs"):
        Engine(tags_often(), CHAT, 1, SLOTS).add(replace(request, sampling=replace(request.sampling, **more)))
