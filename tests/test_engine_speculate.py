"""Speculation changes no token: every drafter against the plain loop, for every kind of layer."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from test_engine_generate import CHAT, SLOTS, differences, plain, requests, tags_often
from test_engine_steer import REGEX, SCHEMA, ask
from test_model_zoo import PATTERNS, noisy
from trivet.config import UserError
from trivet.engine import Engine, Request
from trivet.engine.speculate import MTP, Draft, Drafter, NGram, _followed
from trivet.messages import Sampling, StopReason
from trivet.model import Transformer

NAMES = ["gqa", "window", "mla", "lightning", "delta", "dual", "hybrid"]


def with_mtp(pattern: str) -> Transformer:
    """A model with a prediction module that says something of its own."""
    base = tags_often(pattern)
    model = noisy(base.spec.model_copy(update={"mtp": 1}), seed=3)
    model.load_state_dict({**model.state_dict(), **base.state_dict()})
    return model.eval()


def drafter(kind: str, model: Transformer, ahead: int) -> Drafter:
    if kind == "n-gram":
        return NGram(ahead)
    if kind == "mtp":
        return MTP(model, ahead)
    return Draft(tags_often(seed=5), model, ahead)


@pytest.mark.parametrize("kind", ["n-gram", "draft"])
@pytest.mark.parametrize("name", NAMES)
def test_guessing_changes_no_token(name: str, kind: str) -> None:
    model, asked = tags_often(PATTERNS[name]), requests(12)
    with torch.inference_mode():
        want = [plain(model, CHAT, r) for r in asked]
    for rows, ahead in ((12, 3), (1, 1), (5, 2)):
        engine = Engine(model, CHAT, rows, SLOTS, prefix_bytes=2**22, drafter=drafter(kind, model, ahead))
        assert differences(engine.generate(asked), want) == []
        assert engine.stats.guessed_tokens > engine.stats.right_tokens > 0


@pytest.mark.parametrize("pattern", ["lightning/dense gqa/dense", "gqa/moe mla/dense", "delta/dense window/dense"])
def test_the_models_own_module_guesses(pattern: str) -> None:
    model, asked = with_mtp(pattern), requests(12)
    with torch.inference_mode():
        want = [plain(model, CHAT, r) for r in asked]
    for rows, ahead in ((12, 1), (4, 3)):
        engine = Engine(model, CHAT, rows, SLOTS, prefix_bytes=2**22, drafter=MTP(model, ahead))
        assert differences(engine.generate(asked), want) == [] and engine.stats.guessed_tokens > 50


def test_the_module_reads_what_it_was_trained_on() -> None:
    """With a cache, token by token, the module gives what the training pass gives."""
    model = with_mtp("gqa/dense mla/dense")
    tokens = torch.randint(20, CHAT.vocab_size, (2, 11), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        hidden = model(tokens)
        (want,) = model.mtp_hidden(hidden, tokens)
        cache = model.mtp[0].layer.mixer.new_cache(2, 12, torch.float32, torch.device("cpu"))  # type: ignore[union-attr,operator]
        got = []
        for part in (slice(0, 4), slice(4, 5), slice(5, 10)):
            at = torch.arange(11)[part].expand(2, -1)
            got.append(model.mtp_step(hidden[:, part], tokens[:, part.start + 1 : part.stop + 1], at, cache, part.stop))
        wrong = model.mtp_step(hidden[:, :4], tokens[:, :4], torch.arange(4).expand(2, -1), cache, 4)
    torch.testing.assert_close(torch.cat(got, 1), want[:, :10], atol=1e-5, rtol=1e-4)
    assert (wrong - want[:, :4]).abs().max() > 1e-2


def test_a_draft_that_is_the_model_is_always_right() -> None:
    """Guesses are drawn with the model's own random numbers, so that equal distributions give equal tokens."""
    model = tags_often()
    asked = [Request(r.prompt, Sampling(seed=i, temperature=1.0, max_tokens=31, thinking="off"))
             for i, r in enumerate(requests(9))]  # fmt: skip
    engine = Engine(model, CHAT, 9, SLOTS, drafter=Draft(tags_often(), model, 3))
    done = engine.generate(asked)
    assert differences(done, Engine(model, CHAT, 9, SLOTS).generate(asked)) == []
    long = [c for c in done if c.stop is StopReason.LENGTH]
    # Only what was guessed past the end of a request is not right, which is less than a guess's length for each.
    assert engine.stats.right_tokens > 0.72 * engine.stats.guessed_tokens and len(long) > 3
    assert engine.stats.guessed_tokens - engine.stats.right_tokens <= 3 * len(asked)
    bare = Engine(model, CHAT, 9, SLOTS)
    bare.generate(asked)
    assert engine.stats.decode_tokens == bare.stats.decode_tokens


def test_what_read_a_wrong_guess_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin: without taking back, a recurrent state remembers tokens that were never written."""
    model, asked = tags_often("lightning/dense delta/dense"), requests(8)
    want = Engine(model, CHAT, 8, SLOTS).generate(asked)
    monkeypatch.setattr("trivet.engine.rows.Rows.states", property(lambda self: []))
    engine = Engine(model, CHAT, 8, SLOTS, drafter=Draft(tags_often(seed=5), model, 3))
    assert differences(engine.generate(asked), want) != []


def test_drawn_tokens_follow_the_models_distribution() -> None:
    """Chi-square over the first two tokens of 3,000 requests, 3 likeliest tokens each."""
    model, near, (first, *_) = tags_often(), tags_often(), requests(1)
    with torch.no_grad():
        for p in near.parameters():
            p += 0.2 * p.std() * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    asked = [Request(first.prompt, Sampling(seed=i, temperature=1.0, top_k=3, max_tokens=3, thinking="off", answer_reserve=0))
             for i in range(3000)]  # fmt: skip
    engine = Engine(model, CHAT, 512, SLOTS, drafter=Draft(near, model, 1))
    counts: dict[tuple[int, ...], int] = {}
    for c in engine.generate(asked):
        counts[c.tokens[:2]] = counts.get(c.tokens[:2], 0) + 1
    expected: dict[tuple[int, ...], float] = {}
    with torch.inference_mode():
        for i, j in itertools.product(range(3), repeat=2):
            one = model.logits(model(torch.tensor([first.prompt])))[0, -1].topk(3)
            a = int(one.indices[i])
            two = model.logits(model(torch.tensor([[*first.prompt, a]])))[0, -1].topk(3)
            share = float(one.values.softmax(-1)[i] * two.values.softmax(-1)[j])
            expected[a, int(two.indices[j])] = share * len(asked)
    assert set(counts) <= set(expected) and engine.stats.right_tokens > 100
    chi = sum((counts.get(k, 0) - e) ** 2 / e for k, e in expected.items())
    assert chi < 31.8  # 8 degrees of freedom, p = 0.0001
    wrong = sum((counts.get(k, 0) - len(asked) / 9) ** 2 / (len(asked) / 9) for k in expected)
    assert wrong > 31.8  # the test can tell


@pytest.mark.parametrize("kind", ["n-gram", "draft", "mtp"])
def test_guessing_keeps_to_budgets_grammars_and_stops(kind: str) -> None:
    model = with_mtp("gqa/dense")
    settings: list[dict[str, Any]] = [
        {"grammar": REGEX}, {"grammar": SCHEMA, "thinking": 5}, {"thinking": 0}, {"thinking": 7, "temperature": 0.0},
        {"presence_penalty": 1.0}, {"stop": ("1", "a")}, {"repetition_penalty": 1.2, "top_logprobs": 2}, {},
    ]  # fmt: skip
    asked = [ask(i, **{"thinking": None, **setting}) for i, setting in enumerate(settings * 2)]
    want = Engine(model, CHAT, 8, 200).generate(asked)
    engine = Engine(model, CHAT, 8, 200, drafter=drafter(kind, model, 3))
    got = engine.generate(asked)
    assert [(c.tokens, c.stop, c.reasoning_tokens, c.budget_hit) for c in got] == [
        (c.tokens, c.stop, c.reasoning_tokens, c.budget_hit) for c in want
    ]
    assert engine.stats.right_tokens > 0
    for a, b in zip(got, want, strict=True):
        assert [[t for t, _ in tops] for tops in a.top_logprobs or ()] == [
            [t for t, _ in tops] for tops in b.top_logprobs or ()
        ]


def test_ngrams_are_found_where_they_stood_last() -> None:
    tokens = torch.tensor([5, 1, 2, 3, 9, 9, 1, 2, 3, 7, 8, 1, 2, 3]).numpy()
    assert _followed(tokens, 2).tolist() == [7, 8] and _followed(tokens, 9).tolist() == [7, 8, 1, 2, 3]
    assert _followed(tokens[:7], 3).tolist() == [2, 3, 9] and _followed(tokens[:4], 3).tolist() == []


def test_drafters_that_cannot_guess_are_refused() -> None:
    model = tags_often("lightning/dense")
    with pytest.raises(UserError, match="no multi-token-prediction module"):
        MTP(model, 2)
    with pytest.raises(UserError, match="lightning layers can't guess"):
        Draft(model, model, 2)
    other = noisy(model.spec.model_copy(update={"vocab_size": 50}))
    with pytest.raises(UserError, match="must know the same tokens: it has 50"):
        Draft(other, model, 2)
