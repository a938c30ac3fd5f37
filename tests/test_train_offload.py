"""An optimizer in host memory: the same bits, nothing of it on the device, and gradients that leave as they are made.

Host and device are one here. That the optimizer's tensors are others than the model's, and that no gradient stays with the
model, is what a device would see of it.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from test_rl_learner import CHAT, Digits, config, make
from test_rl_lora import adapted
from test_train_trainer import CONFIG, Counting, busy_model, cuts
from trivet.disk import Journal
from trivet.model import Transformer
from trivet.model.lora import Size, adapter_parameters, attach, places
from trivet.rl.learner import TIMES as RL_TIMES
from trivet.rl.learner import learn
from trivet.train.loop import Interrupted
from trivet.train.offload import Offloaded, Where, make_optimizer
from trivet.train.step import backward
from trivet.train.trainer import TIMES, train

MOVED: list[Where] = ["optimizer", "gradients"]


def adapted_model() -> Transformer:
    model = busy_model()
    attach(model, dict.fromkeys(places(model), Size(3, 6, False)), seed=2)
    return model


def run(out: Path, model: Transformer, **settings: Any) -> tuple[list[Tensor], list[dict[str, Any]]]:
    train(model, Counting(), CONFIG.model_copy(update={"weight_decay": 0.1, "clip": 0.5, **settings}), out)
    lines = Journal(out / "metrics.jsonl").read()
    return list(model.state_dict().values()), [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(map(torch.equal, a, b))


@pytest.mark.parametrize("where", MOVED)
@pytest.mark.parametrize("new", [busy_model, adapted_model])
def test_training_ends_with_the_same_bits(tmp_path: Path, where: Where, new: Any) -> None:
    (plain, said), (moved, again) = run(tmp_path / "a", new()), run(tmp_path / "b", new(), offload=where)
    assert same(plain, moved) and said == again
    assert not same(plain, list(new().state_dict().values()))


def test_a_lost_microbatch_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin: a copy that takes the last gradient instead of the sum."""

    def forget(self: Offloaded, name: str, p: Tensor) -> None:
        self.copies[name].grad, p.grad = p.grad, None

    monkeypatch.setattr(Offloaded, "_move", forget)
    assert not same(run(tmp_path / "a", busy_model())[0], run(tmp_path / "b", busy_model(), offload="gradients")[0])


@pytest.mark.parametrize("new", [busy_model, adapted_model])
def test_gradients_leave_as_they_are_made(new: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most one is with the model at any time, whatever the number of microbatches; without, all are."""
    whole = new()
    backward(whole, cuts()[2], 0.3)
    want = {name: p.grad for name, p in whole.named_parameters() if p.grad is not None}
    assert len(want) > 10

    model, held, move = new(), list[int](), Offloaded._move

    def count(self: Offloaded, name: str, p: Tensor) -> None:
        held.append(sum(q.grad is not None for q in model.parameters()))
        move(self, name, p)

    monkeypatch.setattr(Offloaded, "_move", count)
    optimizer = make_optimizer("gradients", model.optimizer_groups(), 0.02, 3e-3, 0.0)
    backward(model, cuts()[2], 0.3)
    assert set(held) == {1} and len(held) == 2 * len(want)
    assert not any(p.grad is not None for p in model.parameters())
    names = {name: p.grad for name, p in optimizer.named().items() if p.grad is not None}
    assert names.keys() == want.keys() and all(torch.equal(names[name], want[name]) for name in want)

    other = new()
    later = make_optimizer("optimizer", other.optimizer_groups(), 0.02, 3e-3, 0.0)
    backward(other, cuts()[2], 0.3)
    assert sum(p.grad is not None for p in other.parameters()) == len(want)
    later.collect_gradients()
    assert not any(p.grad is not None for p in other.parameters())


@pytest.mark.parametrize("where", MOVED)
def test_what_is_stepped_is_not_the_models(where: Where) -> None:
    model = adapted_model()
    optimizer = make_optimizer(where, model.optimizer_groups(), 0.02, 3e-3, 0.0)
    theirs = {p.data_ptr() for p in model.parameters()}
    assert optimizer.named().keys() == adapter_parameters(model).keys()
    assert not theirs & {p.data_ptr() for p in optimizer.parameters()}


def test_a_run_goes_on_with_another_setting(tmp_path: Path) -> None:
    def at_step_3(metrics: dict[str, Any]) -> None:
        if metrics["step"] == 3:
            os.kill(os.getpid(), signal.SIGINT)

    want, said = run(tmp_path / "a", busy_model())
    for first, then in (("none", "gradients"), ("gradients", "optimizer"), ("optimizer", "none")):
        out = tmp_path / first
        settings = CONFIG.model_copy(update={"weight_decay": 0.1, "clip": 0.5, "offload": first})
        with pytest.raises(Interrupted):
            train(busy_model(), Counting(), settings, out, progress=at_step_3)
        got, again = run(
            out, Transformer(busy_model().spec, seed=9), offload=then
        )  # another start: all is from the state
        assert same(want, got) and said == again, (first, then)


@pytest.mark.parametrize("where", MOVED)
@pytest.mark.parametrize("new", [lambda: make("gqa/moe lightning/dense", noise=0.3), lambda: adapted("mla/moe")])
def test_rl_learns_the_same_with_it(tmp_path: Path, where: Where, new: Any) -> None:
    def play(offload: Where, out: str) -> tuple[list[Tensor], dict[str, Any]]:
        model = new()
        more = config(epochs=2, minibatches=2, objective="grpo", rows=1, muon_lr=0.01, offload=offload)
        last = learn(model, CHAT, [(Digits(), 1.0)], more, tmp_path / out)
        return [p.detach() for p in model.parameters()], {k: v for k, v in last.items() if k not in RL_TIMES}

    (plain, said), (moved, again) = play("none", "plain"), play(where, "moved")
    assert same(plain, moved) and said == again
    assert not same(plain, list(new().parameters()))
