"""What a step of the update holds: never logits of all tokens, and what the plan says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from test_rl_learner import CHAT, config, make
from trivet.agent.loop import Row
from trivet.model import Transformer
from trivet.rl.epochs import Seen, Updates
from trivet.rl.learner import _Run
from trivet.train import losses


def peak(work: Callable[[], object]) -> int:
    """The most bytes that live at once beyond those at the beginning: every allocation and release, added up."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    live = most = 0
    for event in sorted(seen.profiler.kineto_results.events(), key=lambda e: e.start_ns()):  # type: ignore[union-attr]
        if event.name() == "[memory]":
            live += event.nbytes()
            most = max(most, live)
    return most


def rows_of(vocab: int, length: int, sets: bool) -> list[Row]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocab, (4, length + 1), generator=generator).tolist()
    trained = (False,) + (True,) * length
    found = []
    for row in ids:
        drawn = (row[1:], list(range(length + 1)))  # each from a set of one
        kept = ((1, tuple(torch.tensor(x, dtype=torch.int32).numpy() for x in drawn)),) if sets else ()
        found.append(Row(tuple(row), trained, (-1.0,) * (length + 1), (), kept))
    return found


def step_peak(vocab: int, length: int, sets: bool, objective: str = "grpo") -> int:
    spec = make().spec.model_copy(update={"vocab_size": vocab, "context_length": length})
    model = Transformer(spec, seed=1)
    learner: Updates = _Run(
        model, CHAT, [], config(rows=4, length=length, objective=objective), Path("x"), "cpu"
    ).updates
    batch = learner.minibatch(rows_of(vocab, length, sets), range(4), torch.tensor([1.0, -1.0, 1.0, -1.0]))
    learner.backward(batch, Seen())  # kernels and gradients are made
    for p in model.parameters():
        p.grad = None
    return peak(lambda: learner.backward(batch, Seen()))


def grows_together(sets: bool) -> float:
    """How much of the peak grows with vocabulary x length, in fp32 logits of all tokens."""
    v, t = 1500, 250
    both, wide, long, plain = (step_peak(a, b, sets) for a, b in ((2 * v, 2 * t), (2 * v, t), (v, 2 * t), (v, t)))
    return (both - wide - long + plain) / (4 * v * 4 * t)


@pytest.mark.parametrize("sets", [False, True])
def test_no_part_of_the_peak_grows_with_vocabulary_times_length(sets: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "CHUNK", 2**15)
    assert abs(grows_together(sets)) < 0.1
    monkeypatch.setattr(losses, "CHUNK", 2**30)  # the twin: all in one chunk, twice
    assert grows_together(sets) > 1.9
