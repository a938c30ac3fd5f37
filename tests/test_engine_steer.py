"""Penalties, biases, grammars, and what is reported of a distribution."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor

from test_engine_generate import CHAT, SLOTS, differences, requests, tags_often
from trivet.config import UserError
from trivet.engine import Engine, Request
from trivet.engine.steer import _penalise
from trivet.messages import Grammar, Message, Sampling, StopReason

PROMPT = tuple(CHAT.render([Message("user", "12+7=")], generate=True).ids)
SCHEMA = Grammar(
    "json_schema",
    json.dumps({
        "type": "object", "additionalProperties": False, "required": ["a", "ok"],
        "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}, "ok": {"type": "boolean"}},
    }),
)  # fmt: skip
REGEX = Grammar("regex", "(yes|no), [0-9]{2}!")
LARK = Grammar("lark", 'start: NUMBER (OP NUMBER)* "="\nNUMBER: /[1-9]{1,2}/\nOP: "+" | "-"')


def ask(seed: int = 0, **changes: Any) -> Request:
    base = Sampling(temperature=1.0, seed=seed, max_tokens=48, thinking="off", answer_reserve=4)
    return Request(PROMPT, replace(base, **changes))


def run(asked: list[Request], rows: int = 8, slots: int = 200, **options: Any) -> list[Any]:
    return Engine(tags_often(), CHAT, rows, slots, **options).generate(asked)


# ------------------------------------------------------------------------------------------ penalties
def test_repetition_is_punished_as_transformers_does() -> None:
    g = torch.Generator().manual_seed(0)
    logits, known = torch.randn(50, generator=g), np.arange(12).repeat(2)
    want = RepetitionPenaltyLogitsProcessor(1.7)(torch.from_numpy(known)[None], logits[None].clone())[0]
    mine = logits.clone()
    _penalise(mine, Sampling(repetition_penalty=1.7), known, 2)
    torch.testing.assert_close(mine, want)
    assert (logits[known] > 0).any() and (logits[known] < 0).any()  # both branches were taken
    other = logits.clone()
    _penalise(other, Sampling(repetition_penalty=1.6), known, 2)
    assert not torch.allclose(other, want)


def test_presence_counts_once_and_frequency_each_time_in_the_answer_only() -> None:
    row = torch.zeros(6)
    _penalise(row, Sampling(presence_penalty=0.5, frequency_penalty=0.25), np.array([1, 2, 3, 3, 4]), 2)
    assert row.tolist() == [0, 0, 0, -1.0, -0.75, 0]  # 3 twice, 4 once; 1 and 2 are the prompt's


def test_a_bias_forces_and_forbids() -> None:
    token = CHAT.encode_text("7")[0]
    (forced,) = run([ask(logit_bias=((token, 200.0),), max_tokens=5)])
    assert forced.tokens == (token,) * 5
    assert forced.raw_logprobs[0] < -1 and abs(forced.logprobs[0]) < 1e-3  # sampled-from and raw are two things
    free = run([ask(seed) for seed in range(8)])
    common = max(range(CHAT.vocab_size), key=lambda t: sum(c.tokens.count(t) for c in free))
    banned = run([ask(seed, logit_bias=((common, -1000.0),)) for seed in range(8)])
    assert sum(c.tokens.count(common) for c in free) > 3 and not any(common in c.tokens for c in banned)


def test_steered_requests_are_the_same_alone_and_in_a_batch() -> None:
    settings: list[dict[str, Any]] = [
        {"repetition_penalty": 1.3}, {"presence_penalty": 1.0, "frequency_penalty": 0.5}, {"grammar": REGEX},
        {"grammar": SCHEMA, "top_k": 5}, {}, {"logit_bias": ((30, 2.0), (31, -2.0)), "temperature": 0.0},
    ]  # fmt: skip
    asked = [ask(i, **setting) for i, setting in enumerate(settings)] + requests(4)
    together = run(asked, slots=SLOTS + 20)
    alone = [run([request], rows=1, slots=SLOTS + 20)[0] for request in asked]
    assert differences(together, alone) == []
    assert differences(together, run([replace(r, sampling=Sampling(seed=1)) for r in asked], slots=SLOTS + 20)) != []


# ------------------------------------------------------------------------------------------ what stops
def test_stop_ids_end_and_stay() -> None:
    (free,) = run([ask(3)])
    token = next(t for t in free.tokens if t != CHAT.end_id)
    (stopped,) = run([ask(3, stop_ids=(token,))])
    assert stopped.stop is StopReason.STOP_STRING and stopped.tokens[-1] == token
    assert stopped.tokens == free.tokens[: len(stopped.tokens)] and token not in stopped.tokens[:-1]


# ------------------------------------------------------------------------------------------ reports
def test_reported_logprobs_are_those_of_the_training_pass() -> None:
    model = tags_often()
    long = (*PROMPT, *torch.randint(20, CHAT.vocab_size, (150,), generator=torch.Generator().manual_seed(1)).tolist())
    asked = [
        Request(long, Sampling(seed=seed, max_tokens=6, top_logprobs=3, prompt_logprobs=True, top_k=5, thinking="off"))
        for seed in range(2)
    ]
    engine = Engine(model, CHAT, 2, 200, prefix_bytes=2**22)
    for _ in range(2):  # the second time the prompt is known, and computed all the same
        for c in engine.generate(asked):
            with torch.inference_mode():
                logp = model.logits(model(torch.tensor([[*long, *c.tokens]]))).log_softmax(-1)[0]
            want = logp[: len(long) - 1].gather(-1, torch.tensor(long[1:])[:, None]).squeeze(-1)
            torch.testing.assert_close(torch.tensor(c.prompt_logprobs), want, atol=1e-5, rtol=1e-5)
            assert c.top_logprobs is not None and len(c.top_logprobs) == len(c.tokens)
            for i, (tops, sampled) in enumerate(zip(c.top_logprobs, c.sampled, strict=True)):
                best = logp[len(long) - 1 + i].topk(3)
                assert [t for t, _ in tops] == (best.indices.tolist() if sampled else [])
                if sampled:
                    np.testing.assert_allclose([p for _, p in tops], best.values.tolist(), atol=1e-5)
    (plain,) = run([ask()])
    assert plain.top_logprobs is None and plain.prompt_logprobs is None


# ------------------------------------------------------------------------------------------ grammars
def answer(tokens: tuple[int, ...]) -> str:
    return CHAT.decode(tokens[:-1] if tokens[-1] == CHAT.end_id else tokens)


def is_object(text: str) -> bool:
    try:
        value = json.loads(text)
    except ValueError:
        return False
    return set(value) == {"a", "ok"} and 0 <= value["a"] <= 99 and isinstance(value["ok"], bool)


@pytest.mark.parametrize(
    ("grammar", "fits"),
    [(SCHEMA, is_object), (REGEX, lambda t: re.fullmatch("(yes|no), [0-9]{2}!", t) is not None),
     (LARK, lambda t: re.fullmatch("[1-9]{1,2}([+-][1-9]{1,2})*=", t) is not None)],
)  # fmt: skip
def test_answers_fit_the_grammar_and_end(grammar: Grammar, fits: Any) -> None:
    done = run([ask(seed, grammar=grammar, max_tokens=100) for seed in range(12)])
    ended = [c for c in done if c.stop is StopReason.END]
    assert len(ended) > 8 and all(fits(answer(c.tokens)) for c in ended)  # numbers and spaces may go on for long
    assert len({c.text for c in ended}) > 5
    assert not any(fits(answer(c.tokens)) for c in run([ask(seed, max_tokens=100) for seed in range(12)]))


@pytest.mark.parametrize("thinking", [None, 6, 0])
def test_a_grammar_starts_after_the_thought(thinking: int | None) -> None:
    """Thoughts are free, opened by the prompt or by the model; budgets hold; the answer fits."""
    thought = 0
    for opened in (False, True):
        prompt = (*PROMPT, CHAT.think_open_id) if opened else PROMPT
        asked = [
            Request(prompt, Sampling(seed=s, max_tokens=60, thinking=thinking, answer_reserve=20, grammar=REGEX))
            for s in range(30)
        ]
        for c in Engine(tags_often(), CHAT, 30, 200).generate(asked):
            tokens = list(c.tokens)
            inside = opened or (tokens and tokens[0] == CHAT.think_open_id)
            if inside and CHAT.think_close_id not in tokens:
                assert tokens[-1] == CHAT.end_id  # it ended its turn in the middle of the thought
                continue
            if inside:
                at = tokens.index(CHAT.think_close_id)
                thought += at
                assert thinking is None or c.reasoning_tokens <= thinking
                tokens = tokens[at + 1 :]
            assert CHAT.think_open_id not in tokens
            assert c.stop is StopReason.END and re.fullmatch("(yes|no), [0-9]{2}!", answer(tuple(tokens)))
    assert thought > 0


def test_a_bad_grammar_fails_alone() -> None:
    engine = Engine(tags_often(), CHAT, 4, 200)
    good = engine.add(ask())
    for grammar in (Grammar("regex", "(["), Grammar("json_schema", "{"), Grammar("lark", "start: nowhere")):
        with pytest.raises(UserError, match=f"{grammar.kind} grammar can't be read"):
            engine.add(ask(grammar=grammar))
    with pytest.raises(UserError, match="logit_bias names token 9999"):
        engine.add(ask(logit_bias=((9999, 1.0),)))
    done = dict[int, Any]()
    while engine.busy:
        done |= engine.step()
    done |= engine.step()
    assert set(done) == {good} and done[good].error is None


@pytest.mark.parametrize(
    ("change", "says"),
    [({"repetition_penalty": 0.0}, "repetition_penalty"), ({"presence_penalty": float("nan")}, "presence_penalty"),
     ({"top_logprobs": -1}, "top_logprobs"), ({"stop": ("",)}, "stop string is empty"), ({"stop_ids": (-4,)}, "stop_ids")],
)  # fmt: skip
def test_settings_out_of_range_are_refused(change: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        Engine(tags_often(), CHAT, 1, SLOTS).add(ask(**change))
