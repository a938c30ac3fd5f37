"""A completion that was cut off goes on as if nothing had happened, or with other weights from there on."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from test_engine_generate import CHAT, SLOTS, differences, requests, tags_often
from test_engine_repeating import sure_of_itself
from trivet.config import UserError
from trivet.engine import Engine, Request
from trivet.messages import Completion, StopReason
from trivet.model import Transformer


def interrupted(models: list[Transformer], asked: list[Request], steps: int = 7, rows: int = 9) -> list[Completion]:
    """Every model but the last is allowed a few steps; the next one goes on in a new engine."""
    done: dict[int, Completion] = {}
    for model in models:
        engine = Engine(model, CHAT, rows, SLOTS, record_experts=True)
        parts = [None if i not in done or not done[i].tokens else done[i] for i in range(len(asked))]
        ids = {
            engine.add(replace(request, so_far=part)): i
            for i, (request, part) in enumerate(zip(asked, parts, strict=True))
            if i not in done or done[i].stop is StopReason.CANCELLED
        }
        ended: list[tuple[int, Completion]] = []
        for _ in range(steps if model is not models[-1] else 1000):
            ended += engine.step()
        engine.cancel_all()
        ended += engine.step()
        done |= {ids[id]: completion for id, completion in ended}
    return [done[i] for i in range(len(asked))]


@pytest.mark.parametrize("pattern", ["gqa/moe", "mla/dense", "lightning/dense gqa/moe"])
def test_it_goes_on_as_if_nothing_had_happened(pattern: str) -> None:
    model, other = tags_often(pattern), tags_often(pattern, seed=1)
    asked = [replace(r, sampling=replace(r.sampling, keep_sets=r.sampling.temperature > 0)) for r in requests(24)]
    want = Engine(model, CHAT, 9, SLOTS, record_experts=True).generate(asked)
    drop = [replace(c, experts=None, sets=None) for c in want]
    for models in ([model] * 2, [model] * 4):
        ours = interrupted(models, asked)
        assert differences([replace(c, experts=None, sets=None) for c in ours], drop) == []
        for a, b in zip(ours, want, strict=True):
            assert a.experts is not None and b.experts is not None
            assert all(np.array_equal(x, y) for x, y in zip(a.experts, b.experts, strict=True))
            assert (a.sets is None) == (b.sets is None)
            assert a.sets is None or all(np.array_equal(x, y) for x, y in zip(a.sets, b.sets, strict=True))  # type: ignore[arg-type]
    assert any(c.sets is not None and len(c.sets[0]) for c in want) and any(c.budget_hit for c in want)
    # The twin: other weights write another end, behind the beginning that was there.
    mixed = interrupted([model, other], asked)
    changed = [i for i, (a, b) in enumerate(zip(mixed, want, strict=True)) if a.tokens != b.tokens]
    assert len(changed) > 8
    assert any(mixed[i].tokens[:3] == want[i].tokens[:3] for i in changed)


def test_runs_of_certain_tokens_go_on_too() -> None:
    model = sure_of_itself()
    asked = [replace(r, sampling=replace(r.sampling, halt_repeating=3)) for r in requests(24)]
    want = Engine(model, CHAT, 9, SLOTS).generate(asked)
    ours = interrupted([model] * 6, asked, steps=2, rows=24)
    assert [(c.tokens, c.stop) for c in ours] == [(c.tokens, c.stop) for c in want]
    assert sum(c.stop is StopReason.REPETITION for c in want) > 3


def test_what_a_beginning_does_not_keep_is_refused() -> None:
    model = tags_often()
    (begun,) = Engine(model, CHAT, 1, SLOTS).generate(requests(1))
    with pytest.raises(UserError, match="so_far keeps tokens"):
        request = requests(1)[0]
        asks = replace(request, so_far=begun, sampling=replace(request.sampling, top_logprobs=2))
        Engine(model, CHAT, 1, SLOTS).add(asks)


def test_cancelled_while_it_waits_it_keeps_its_beginning() -> None:
    model, request = tags_often(), requests(1)[0]
    first = Engine(model, CHAT, 3, SLOTS)
    begun = [first.add(replace(request, sampling=replace(request.sampling, seed=i))) for i in range(3)]
    for _ in range(5):
        first.step()
    first.cancel_all()
    parts = [completion for _, completion in sorted(first.step(), key=lambda end: begun.index(end[0]))]
    engine = Engine(model, CHAT, 1, SLOTS)
    ids = [engine.add(replace(request, so_far=part)) for part in parts]
    engine.cancel_all()
    done = dict(engine.step())
    assert [done[i].tokens for i in ids] == [c.tokens for c in parts] and all(len(c.tokens) > 1 for c in parts)
    assert [done[i].logprobs for i in ids] == [c.logprobs for c in parts]
