"""An answer that repeats itself is halted: where, by the rule written down anew over answers that were not."""

from __future__ import annotations

from dataclasses import replace
from math import log
from pathlib import Path

import pytest
import torch

from test_engine_generate import CHAT, SLOTS, differences, requests, tags_often
from test_rl_learner import CHAT as RL_CHAT
from test_rl_learner import Digits, config, make
from trivet.config import UserError
from trivet.engine import Engine, Request
from trivet.engine.speculate import NGram
from trivet.messages import Completion, StopReason
from trivet.model import Transformer
from trivet.rl.learner import learn

LENGTH = 3


def sure_of_itself() -> Transformer:
    """A model whose choices are certain about a third of the time."""
    model = tags_often()
    assert model.head is not None
    with torch.no_grad():
        model.head *= 15
        model.head[CHAT.end_id] *= 4
    return model


def halted(free: Completion, length: int) -> tuple[int, ...]:
    """The tokens up to the end of the first run of `length` certain ones."""
    run = 0
    for i, (sampled, raw) in enumerate(zip(free.sampled, free.raw_logprobs, strict=True)):
        run = run + 1 if sampled and raw > log(0.99) else 0
        if run == length:
            return free.tokens[: i + 1]
    return free.tokens


def asked(length: int) -> list[Request]:
    return [
        Request(r.prompt, replace(r.sampling, halt_repeating=length), stop_on_tool=r.stop_on_tool) for r in requests(24)
    ]


def test_it_ends_with_the_first_run_of_certain_tokens() -> None:
    model = sure_of_itself()
    free, ours = (Engine(model, CHAT, 7, SLOTS).generate(asked(n)) for n in (0, LENGTH))
    assert [c.tokens for c in ours] == [halted(c, LENGTH) for c in free]
    stopped = [c for c, f in zip(ours, free, strict=True) if len(c.tokens) < len(f.tokens)]
    assert len(stopped) > 5 and all(c.stop is StopReason.REPETITION for c in stopped)
    assert sum(c.stop is StopReason.END for c in ours) > 2  # an end that comes first is an end
    assert any(f.budget_hit and len(c.tokens) == len(f.tokens) > LENGTH for c, f in zip(ours, free, strict=True))
    # The twins: another length ends elsewhere, and so do tokens that are certain only because others were cut off.
    assert [c.tokens for c in ours] != [halted(c, LENGTH + 1) for c in free]
    cut_off = [c for c in free if halted(c, LENGTH) != halted(replace(c, raw_logprobs=c.logprobs), LENGTH)]
    assert cut_off


@pytest.mark.parametrize("how", ["guessed", "set aside", "alone"])
def test_where_it_ends_depends_on_the_text_alone(how: str) -> None:
    model = sure_of_itself()
    want = Engine(model, CHAT, 7, SLOTS).generate(asked(LENGTH))
    engine = Engine(model, CHAT, 1 if how == "alone" else 5, SLOTS, drafter=NGram(3) if how == "guessed" else None)
    ids, done = [engine.add(request) for request in asked(LENGTH)], dict[int, Completion]()
    step = 0
    while len(done) < len(ids):
        if how == "set aside" and step % 2:
            engine.set_aside(ids[step % len(ids)])
        done |= engine.step()
        step += 1
    assert differences([done[i] for i in ids], want) == []
    assert how != "guessed" or engine.stats.right_tokens > 0
    assert how != "set aside" or engine.stats.set_aside > 3


def test_less_than_nothing_is_refused() -> None:
    with pytest.raises(UserError, match="halt_repeating = -1"):
        Engine(sure_of_itself(), CHAT, 1, SLOTS).generate(asked(-1)[:1])


def test_a_halted_answer_is_counted_graded_and_trained_on(tmp_path: Path) -> None:
    def certain() -> Transformer:
        model = make(noise=0.3)
        assert model.head is not None
        with torch.no_grad():
            model.head *= 8
        return model

    def last(name: str, length: int) -> dict[str, float]:
        settings = config(steps=1, problems=12, max_tokens=40, halt_repeating=length)
        return learn(certain(), RL_CHAT, [(Digits(), 1.0)], settings, tmp_path / name)

    halts, goes_on = last("halts", 2), last("goes on", 0)
    assert halts["repeats"] > 0.1 and goes_on["repeats"] == 0
    assert halts["not_ok"] == 0 and halts["no_spread"] < 0.5
    assert halts["trained_share"] == pytest.approx(1 - halts["no_spread"])
    assert halts["answer_tokens"] < goes_on["answer_tokens"] and halts["truncated"] >= halts["repeats"]
    assert halts["ratio/max_abs_log"] == 0 and halts["mismatch/kl"] < 1e-5
