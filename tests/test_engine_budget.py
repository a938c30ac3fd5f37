"""Budgets beyond the plain one: a minimum, a change on the way, a conversation's; with every drafter."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from test_engine_generate import CHAT, tags_often
from test_engine_speculate import drafter, with_mtp
from trivet.config import UserError
from trivet.engine import Engine, EngineModel, Request
from trivet.messages import Completion, Message, Sampling, StopReason
from trivet.model import Transformer

PROMPT = tuple(CHAT.render([Message("user", "12+7=")], generate=True).ids)
OPEN = (*PROMPT, CHAT.think_open_id)
MODELS: dict[str, Transformer] = {}


def model_of(kind: str) -> Transformer:
    return MODELS.setdefault(kind, with_mtp("gqa/dense") if kind == "mtp" else tags_often())


def thought(c: Completion) -> list[int]:
    """Tokens between the first opening and the next closing tag, the prompt's opening included."""
    tokens = list(c.tokens)
    if c.prompt_tokens[-1] != CHAT.think_open_id:
        tokens = tokens[tokens.index(CHAT.think_open_id) + 1 :] if CHAT.think_open_id in tokens else []
    return tokens[: tokens.index(CHAT.think_close_id)] if CHAT.think_close_id in tokens else tokens


@pytest.mark.parametrize("prompt", [PROMPT, OPEN])
def test_a_minimum_makes_thoughts_go_on(prompt: tuple[int, ...]) -> None:
    """s1's way: where the tag would come too early, the continuing message comes instead."""
    waits = CHAT.continuing_ids

    def run(least: int) -> list[Completion]:
        asked = [
            Request(prompt, Sampling(seed=s, max_tokens=80, min_thinking=least, answer_reserve=8)) for s in range(80)
        ]
        return [c for c in Engine(tags_often(), CHAT, 80, 200).generate(asked) if CHAT.think_close_id in c.tokens]

    free, long = run(0), run(20)
    assert min(len(thought(c)) for c in free) < 8 and len(long) > 5
    waited = 0
    for c in long:
        inside = thought(c)
        assert len(inside) >= 20
        waited += any(inside[i : i + len(waits)] == waits for i in range(len(inside)))
    assert waited > 1
    for c in (c for c in free if prompt == OPEN and len(thought(c)) >= 20):
        assert c.tokens in [other.tokens for other in long]  # where the minimum was met, nothing was touched


def test_a_minimum_without_room_leaves_the_answer_its_room() -> None:
    asked = [Request(OPEN, Sampling(seed=s, max_tokens=24, min_thinking=500, answer_reserve=6)) for s in range(16)]
    for c in Engine(tags_often(), CHAT, 16, 200).generate(asked):
        if c.stop is not StopReason.END or CHAT.think_close_id in c.tokens:
            assert CHAT.think_close_id in c.tokens[: 24 - 6]


@pytest.mark.parametrize(
    ("change", "says"),
    [({"min_thinking": 9, "thinking": 5}, "min_thinking = 9 can't be kept with thinking = 5"), ({"min_thinking": -1}, "min_thinking"),
     ({"min_thinking": 1, "thinking": "off"}, "min_thinking = 1")],
)  # fmt: skip
def test_minimums_that_contradict_are_refused(change: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        Engine(tags_often(), CHAT, 1, 100).add(Request(PROMPT, Sampling(**change)))


@pytest.mark.parametrize("kind", ["none", "n-gram"])
def test_a_budget_may_change_on_the_way(kind: str) -> None:
    model, cut, untouched = tags_often(), 0, 0
    for seed in range(20):
        asked = Request(OPEN, Sampling(seed=seed, max_tokens=60, answer_reserve=8))
        (free,) = Engine(model, CHAT, 1, 200).generate([asked])
        engine = Engine(model, CHAT, 1, 200, drafter=None if kind == "none" else drafter(kind, model, 2))
        id, done = engine.add(asked), dict[int, Completion]()
        for step in range(200):
            if step == 4:
                engine.set_budget(id, 9)
            done |= engine.step()
            if id in done:
                break
        c = done[id]
        if free.reasoning_tokens <= 9:
            untouched += c.tokens == free.tokens
        else:
            assert c.budget_hit and c.reasoning_tokens == 9 and c.tokens[:9] == free.tokens[:9]
            cut += 1
    assert cut > 3 and untouched > 1
    engine.set_budget(12345, 3)  # of a request that is gone: nothing to do


def test_a_conversations_budget_counts_all_its_turns() -> None:
    engine = Engine(tags_often(), CHAT, 1, 400)
    model = EngineModel(engine, CHAT)
    (first,) = engine.generate([Request(OPEN, Sampling(seed=3, max_tokens=40, thinking=7, answer_reserve=8))])
    assert first.reasoning_tokens > 0
    said = Message("assistant", completion=first, content="8")
    talk = [Message("user", "12+7="), said, Message("user", "9-1=")]
    assert model.request(talk, (), Sampling(thinking=7)).reasoning_used == 0
    whole = model.request(talk, (), Sampling(thinking=7, budget_for="conversation"))
    assert whole.reasoning_used == first.reasoning_tokens


@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_budgets_are_kept_with_every_drafter(data: st.DataObject) -> None:
    """reasoning tokens <= budget, one closing tag a thought, an answer where there is room, exact accounting."""
    kind = data.draw(st.sampled_from(["none", "n-gram", "draft", "mtp"]))
    budget = data.draw(st.sampled_from([0, 1, 6, None]))
    least = data.draw(st.sampled_from([0, 0, 4])) if budget in (6, None) else 0
    prompt = data.draw(st.sampled_from([PROMPT, OPEN]))
    most = data.draw(st.integers(20, 60))
    model = model_of("mtp" if kind == "mtp" else "plain")
    sampling = Sampling(
        temperature=data.draw(st.sampled_from([0.0, 1.0])), seed=data.draw(st.integers(0, 99)), max_tokens=most,
        thinking=budget, min_thinking=least, answer_reserve=6,
    )  # fmt: skip
    engine = Engine(model, CHAT, 2, 200, drafter=None if kind == "none" else drafter(kind, model, 3))
    c, bare = (
        engine.generate([Request(prompt, sampling)])[0],
        Engine(model, CHAT, 1, 200).generate([Request(prompt, sampling)])[0],
    )
    assert (c.tokens, c.stop, c.budget_hit, c.reasoning_tokens) == (
        bare.tokens,
        bare.stop,
        bare.budget_hit,
        bare.reasoning_tokens,
    )
    inside, counted, tags = prompt == OPEN, 0, 0
    for token, sampled in zip(c.tokens, c.sampled, strict=True):
        if inside:
            counted += sampled and token != CHAT.think_close_id
            tags += token == CHAT.think_close_id
        inside = token == CHAT.think_open_id or (inside and token != CHAT.think_close_id)
    assert c.reasoning_tokens == counted and (budget is None or counted <= budget)
    opened = (prompt == OPEN) + c.tokens.count(CHAT.think_open_id)
    if c.stop is StopReason.LENGTH and opened:
        assert not inside or c.tokens[-1] == CHAT.think_open_id  # closed in time, unless opened by the very last token
    assert tags <= opened


def test_a_long_forced_text_is_one_piece() -> None:
    """Of a row alone. Among twelve rows it goes token by token with their steps, and the text is the same."""
    model, calls = tags_often(), list[int]()
    model.register_forward_pre_hook(lambda module, args: calls.append(args[0].shape[1]))
    asked = [Request(OPEN, Sampling(seed=s, max_tokens=80, min_thinking=20, answer_reserve=8)) for s in range(12)]
    alone = [Engine(model, CHAT, 1, 200).generate([request])[0] for request in asked]
    pieces = max(calls[1:])  # the first is the prompt
    forced = sum(not sampled for c in alone for sampled in c.sampled)
    assert forced > 20 and pieces >= len(CHAT.continuing_ids) - 1
    assert len(calls) < len(asked) + sum(len(c.tokens) for c in alone) - forced / 2
    calls.clear()
    together = Engine(model, CHAT, 12, 200).generate(asked)
    assert set(calls[1:]) == {1}
    for a, b in zip(alone, together, strict=True):
        assert a.tokens == b.tokens and a.logprobs == pytest.approx(b.logprobs, abs=1e-5)


def test_a_prompt_is_reported_once_although_its_row_comes_back() -> None:
    asked = Request(PROMPT, Sampling(seed=1, max_tokens=40, prompt_logprobs=True, min_thinking=20, answer_reserve=8))
    (want,) = Engine(tags_often(), CHAT, 1, 200).generate([asked])
    engine = Engine(tags_often(), CHAT, 1, 200)
    id, done = engine.add(asked), dict[int, Completion]()
    for step in range(200):
        done |= engine.step()
        if step in (1, 5, 11):
            engine.set_aside(id)
        if not engine.busy:
            break
    assert engine.stats.set_aside == 3 and done[id].tokens == want.tokens
    assert want.prompt_logprobs is not None and len(want.prompt_logprobs) == len(PROMPT) - 1
    assert done[id].prompt_logprobs == pytest.approx(want.prompt_logprobs, abs=1e-5)
