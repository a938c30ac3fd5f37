"""Thousands of random requests with everything that may happen to them: no leaked entry, no wrong token."""

from __future__ import annotations

import random
import warnings

import pytest
import torch

from test_engine_generate import CHAT, differences
from test_engine_prefix import conserved
from test_engine_speculate import with_mtp
from test_engine_steer import REGEX
from trivet.config import UserError
from trivet.engine import Engine, Request
from trivet.engine.speculate import MTP
from trivet.messages import Completion, Grammar, Message, Sampling, StopReason

SLOTS = 120


def kinds(rng: random.Random) -> list[Request]:
    """Requests of every sort; some share their prompt or the start of one."""
    start = tuple(CHAT.render([Message("user", "1+2+3=")], generate=True).ids)
    prompts = [start, (*start, CHAT.think_open_id)]
    for _ in range(4):
        base = rng.choice(prompts)[:4]
        prompts.append((*base, *(rng.randrange(20, CHAT.vocab_size) for _ in range(rng.choice((3, 17, 40))))))
    found = []
    for i in range(40):
        sampling = Sampling(
            temperature=rng.choice((0.0, 1.0)), top_p=rng.choice((1.0, 0.9)), seed=i, max_tokens=rng.choice((3, 8, 24)),
            thinking=rng.choice((None, "off", 0, 5)), answer_reserve=3, stop=rng.choice(((), ("7",))),
            presence_penalty=rng.choice((0.0, 0.0, 0.5)), grammar=REGEX if i % 8 == 3 else None,
        )  # fmt: skip
        found.append(Request(rng.choice(prompts), sampling))
    return found


def soak(count: int, seed: int, pattern: str = "gqa/dense lightning/moe mla/dense") -> dict[str, int]:
    """Run `count` requests through one engine, and check every completion against the same request alone."""
    rng = random.Random(seed)
    model = with_mtp(pattern)
    pool = kinds(rng)
    want = [Engine(model, CHAT, 1, SLOTS).generate([r])[0] for r in pool]
    engine = Engine(model, CHAT, 24, SLOTS, prefix_bytes=400_000, drafter=MTP(model, 2))
    asked: dict[int, int] = {}
    changed: set[int] = set()
    done: dict[int, Completion] = {}
    refused = 0
    while len(asked) < count or engine.busy:
        for _ in range(rng.randrange(4)):
            if len(asked) < count:
                which = rng.randrange(len(pool))
                asked[engine.add(pool[which])] = which
        alive = [id for id in asked if id not in done]
        luck = rng.random()
        if alive and luck < 0.10:
            engine.cancel(rng.choice(alive))
        elif alive and luck < 0.20:
            engine.set_aside(rng.choice(alive))
        elif alive and luck < 0.25:
            id = rng.choice(alive)
            if pool[asked[id]].sampling.thinking != "off":
                engine.set_budget(id, rng.choice((None, 0, 3)))
                changed.add(id)
        elif luck < 0.27:
            with pytest.raises(UserError):
                engine.add(Request(pool[0].prompt, Sampling(grammar=Grammar("regex", "(["))))
            refused += 1
        elif luck < 0.272 and engine.max_rows > 4 and engine.rows.live:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                engine._shrink(RuntimeError("can't allocate memory"))
            engine.max_rows = 24
        done |= engine.step()
    done |= engine.step()
    assert set(done) == set(asked) and not engine.rows.alive.any() and not engine._by_id
    assert engine.prefixes is not None
    conserved(engine.prefixes)
    wrong = [
        id for id, c in done.items()
        if id not in changed and (
            c.tokens != want[asked[id]].tokens[: len(c.tokens)]
            or (c.stop is not StopReason.CANCELLED and differences([c], [want[asked[id]]]) != [])
        )
    ]  # fmt: skip
    assert wrong == []
    budgets = [c for id, c in done.items() if id in changed]
    assert all(c.error is None for c in budgets)
    return {
        "requests": len(done), "cancelled": sum(c.stop is StopReason.CANCELLED for c in done.values()),
        "set aside": engine.stats.set_aside, "budgets changed": len(changed), "out of memory": engine.stats.shrunk,
        "refused": refused, "cached tokens": engine.stats.cached_tokens, "guesses right": engine.stats.right_tokens,
        "evicted": engine.prefix_stats.evicted_nodes,
    }  # fmt: skip


def test_hundreds_of_requests_with_everything_that_may_happen() -> None:
    told = soak(600, seed=0)
    assert all(told[what] > 0 for what in told)


def test_a_wrong_token_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin: a store that gives back another row's numbers."""
    from trivet.engine.prefix import PrefixStore

    real = PrefixStore.load

    def load(self: PrefixStore, hit: object, caches: list[object], row: int) -> None:
        real(self, hit, caches, row)  # type: ignore[arg-type]
        with torch.inference_mode():
            for cache in caches:
                cache.tensors[0][row] *= 1.5  # type: ignore[attr-defined]

    monkeypatch.setattr(PrefixStore, "load", load)
    with pytest.raises(AssertionError):
        soak(60, seed=0)
