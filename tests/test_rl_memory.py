"""What a step of the update holds: never logits of all tokens, and what the plan says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from test_measure_memory import process, trial_spec
from test_rl_learner import CHAT, config, make
from trivet.agent.loop import Row
from trivet.measure.activations import Setting
from trivet.measure.memory import training_memory
from trivet.measure.trial import FREED
from trivet.measure.trial_run import WARM_UP, peak_bytes
from trivet.model import Transformer
from trivet.rl.epochs import Seen, Updates
from trivet.rl.learner import _Run
from trivet.spec import ModelSpec
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


def rows_of(vocab: int, length: int, sets: bool = False, count: int = 4) -> list[Row]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocab, (count, length + 1), generator=generator).tolist()
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


# --------------------------------------------------------------------------------------------- the plan
UPDATES: list[tuple[str, dict[str, Any], str]] = [
    ("dense", {}, "dapo"),
    ("dense", {"precision": "bf16", "rows": 6}, "dapo"),
    ("mla_moe", {}, "grpo"),
    ("lightning", {"recompute": True, "accumulate": 2}, "dapo"),
]


@process
@pytest.mark.parametrize(("name", "more", "objective"), UPDATES)
def test_an_update_takes_what_a_training_step_is_predicted_to(name: str, more: dict[str, Any], objective: str) -> None:
    spec = trial_spec(name).model_copy(update={"mtp": 0})
    s = Setting(**{"rows": 4, "length": 512, "precision": "fp32", "cpu": True, **more})
    question = {"spec": spec.model_dump(mode="json"), "setting": s.model_dump(), "objective": objective}
    done = subprocess.run(
        [sys.executable, __file__], input=json.dumps(question), capture_output=True, text=True,
        env=os.environ | FREED | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = training_memory(spec, s)
    reference = said.weights if objective == "grpo" else 0
    assert said.peak + reference == pytest.approx(int(done.stdout), rel=0.1)
    assert said.weights + said.gradients + said.optimizer + reference < int(done.stdout) / 1.4  # the twin: state alone


def one_update(spec: ModelSpec, s: Setting, objective: str) -> None:
    settings = config(
        rows=s.rows, length=s.length, precision=s.precision, recompute=s.recompute, objective=objective,
        mismatch_limit=1e9, problems=s.rows,
    )  # fmt: skip
    spec = spec.model_copy(update={"context_length": max(spec.context_length, s.length)})
    count = s.rows * s.accumulate
    learner = _Run(Transformer(spec), CHAT, [], settings, Path("nowhere"), "cpu").updates
    learner.learn_from(rows_of(spec.vocab_size, s.length, count=count), torch.linspace(-1, 1, count), 0)


if __name__ == "__main__":  # in a process of its own, whose peak is that of the update
    asked = json.load(sys.stdin)
    setting = Setting(**asked["setting"])
    one_update(WARM_UP, setting.model_copy(update={"rows": 1, "length": 16}), asked["objective"])
    before = peak_bytes(torch.device("cpu"))
    one_update(ModelSpec(**asked["spec"]), setting, asked["objective"])
    print(peak_bytes(torch.device("cpu")) - before)
