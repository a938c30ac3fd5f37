"""The optimizer steps on a batch: what they take as denominators, what they draw from, and which experts they replay."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from test_rl_learner import CHAT, Calls, Digits, config, eager_caller, make
from trivet.agent.loop import Row
from trivet.config import UserError
from trivet.engine import Engine
from trivet.messages import Sampling
from trivet.model import Routing, Transformer
from trivet.rl import update
from trivet.rl.epochs import Minibatch, Seen, Updates
from trivet.rl.learner import _Run, learn
from trivet.rl.rollout import Job, play
from trivet.rl.update import Packed, deal, pack

HYBRID = "lightning/moe delta/dense gqa/moe mla/moe"


def some_rows(model: Transformer, count: int = 12, record: bool = False, **sampling: Any) -> list[Row]:
    jobs: Any = [
        Job(Calls(), Calls().problem("train", s), Sampling(max_tokens=20, seed=s, thinking=6, **sampling))  # type: ignore[arg-type]
        for s in range(count)
    ]
    engine = Engine(model.eval(), CHAT, 8, 65, record_experts=record, prefix_bytes=2**20)
    return [attempt.row for attempt in play(engine, jobs, 3)]


def updates_of(model: Transformer, **changes: Any) -> Updates:
    return _Run(model, CHAT, [], config(**changes), Path("nowhere"), "cpu").updates


# --------------------------------------------------------------------------------------- epochs and minibatches
def test_rows_are_dealt_once_and_evenly() -> None:
    lengths = [int(n) for n in np.random.default_rng(0).integers(5, 60, 37)]
    rows = [Row((1,) * n, (False,) + (True,) * (n - 1), (0.0,) * n) for n in lengths]
    for count in (1, 2, 5, 37, 50):
        dealt = deal(rows, count)
        assert sorted(i for hand in dealt for i in hand) == list(range(37)) and len(dealt) == min(count, 37)
        assert dealt == deal(rows, count)
        if count <= 5:
            tokens = [sum(lengths[i] for i in hand) for hand in dealt]
            assert max(tokens) - min(tokens) < 60
            plain = [sum(lengths[k::count]) for k in range(count)]  # the twin: dealt as they come
            assert count == 1 or max(plain) - min(plain) > max(tokens) - min(tokens)


def test_without_a_step_every_ratio_is_one_to_the_bit(tmp_path: Path) -> None:
    """The denominators come from a pass without gradient, and are those that a pass with it gives."""
    still = config(problems=8, epochs=2, minibatches=3, muon_lr=0, adam_lr=0)
    last = learn(make(HYBRID, noise=0.3), CHAT, [(Calls(), 1.0)], still, tmp_path / "still")
    assert last["updates"] == 6 and last["ratio/max_abs_log"] == last["ratio/last_max_abs_log"] == 0.0
    assert last["grad_norm"] > 0 and 0 < last["mismatch/max_abs_log"] < 1e-4
    moving = still.model_copy(update={"muon_lr": 0.003})  # the twin
    last = learn(make(HYBRID, noise=0.3), CHAT, [(Calls(), 1.0)], moving, tmp_path / "moving")
    assert last["ratio/max_abs_log"] == 0.0 < 1e-4 < last["ratio/last_max_abs_log"]


def test_denominators_are_of_the_weights_that_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(HYBRID, noise=0.3)
    rows, before = some_rows(model), copy.deepcopy(model)
    learner = updates_of(model, epochs=2, minibatches=3, muon_lr=0.01)
    made: list[Minibatch] = []
    whole = learner.minibatch
    monkeypatch.setattr(learner, "minibatch", lambda *a: made.append(whole(*a)) or made[-1])
    learner.learn_from(rows, torch.linspace(-1, 1, len(rows)), 0)
    assert len(made) == 3
    for batch in made:
        for part in batch.parts:
            with torch.no_grad():
                old, new = (learner.logprobs(m, part, Routing(replay=part.experts))[0] for m in (before, model))
            assert part.old is not None and torch.equal(part.old, old)
            assert (new - old).abs().max() > 1e-3  # the twin: of the weights as they are now they are others


@pytest.mark.parametrize(("epochs", "minibatches"), [(1, 1), (3, 1), (1, 3), (2, 3)])
def test_only_later_minibatches_cost_a_further_pass(
    epochs: int, minibatches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make(noise=0.3)
    rows = some_rows(model)
    learner = updates_of(model, epochs=epochs, minibatches=minibatches, rows=64, length=128)  # a part each
    calls = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda *a, **k: calls.append(torch.is_grad_enabled()) or forward(*a, **k))
    learner.learn_from(rows, torch.linspace(-1, 1, len(rows)), 0)
    assert calls == [False] * (minibatches - 1) + [True] * (epochs * minibatches)


def test_a_minibatch_weighs_its_own_tokens() -> None:
    """Each optimizer step is on the mean over its minibatch: of equal rows, that is the mean over the batch."""
    model = make(noise=0.3)
    row = some_rows(model, 1)[0]

    def gradient(which: list[int], rows: list[Row]) -> torch.Tensor:
        learner = updates_of(model)
        learner.backward(learner.minibatch(rows, which, torch.ones(len(rows))), Seen())
        found = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        model.zero_grad()
        return found

    one, all_six = gradient([4, 1], [row] * 6), gradient(list(range(6)), [row] * 6)
    torch.testing.assert_close(one, all_six, rtol=1e-4, atol=1e-6)
    assert one.norm() > 1e-3


# ------------------------------------------------------------------------------------------- truncated sampling
TRUNCATED = [
    {"top_p": 0.7},
    {"top_k": 5},
    {"min_p": 0.1},
    {"top_p": 0.9, "top_k": 20, "min_p": 0.02, "temperature": 1.3},
]


@pytest.mark.parametrize("how", TRUNCATED, ids=str)
def test_truncated_sampling_is_accounted_on_both_sides(
    how: dict[str, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(problems=8, thinking=4, minibatches=2, objective="grpo", **how)
    last = learn(make("gqa/moe mla/dense", noise=0.3), CHAT, [(Calls(), 1.0)], settings, tmp_path)
    assert last["ratio/max_abs_log"] == 0.0
    assert 0 < last["mismatch/max_abs_log"] < 1e-4 and last["mismatch/kl"] < 1e-7
    monkeypatch.setattr(update, "_sets", lambda rows: None)  # the twin: over the whole vocabulary
    with pytest.raises(UserError, match="engine and trainer disagree"):
        learn(make("gqa/moe mla/dense", noise=0.3), CHAT, [(Calls(), 1.0)], settings, tmp_path / "twin")
    loose = settings.model_copy(update={"mismatch_limit": 1e9})
    other = learn(make("gqa/moe mla/dense", noise=0.3), CHAT, [(Calls(), 1.0)], loose, tmp_path / "loose")
    assert other["mismatch/max_abs_log"] > 0.1 and other["entropy"] > last["entropy"]


def test_packed_sets_are_those_that_the_engine_recorded() -> None:
    rows = some_rows(eager_caller(), 40, top_p=0.97, keep_sets=True)
    forced = 0
    for part in pack(rows, 3, 64):
        assert part.sets is not None
        ends = part.sets.offsets.tolist()
        drawn = [part.sets.ids[a:b].tolist() for a, b in pairwise(ends)]
        assert len(drawn) == len(part.targets)
        assert all(target in ids for target, ids in zip(part.targets.tolist(), drawn, strict=True))
        assert 1 < np.mean([len(ids) for ids in drawn]) < 0.9 * CHAT.vocab_size
    for row in rows:
        for start, (ids, ends) in row.sets:
            sizes = np.diff(ends)
            assert ends[-1] == len(ids)
            assert [size > 0 for size in sizes] == list(row.trained[start : start + len(sizes)])
            forced += int((sizes == 0).sum())
    assert forced > 5
    assert all(
        not row.sets for row in some_rows(make(noise=0.3), keep_sets=True)
    )  # nothing is left out, nothing is recorded


# --------------------------------------------------------------------------------------------- replay of experts
def test_the_engines_choices_are_replayed(tmp_path: Path) -> None:
    """In fp32 they are the trainer's own but for ties, in every position, whatever was found or copied."""
    model = make("gqa/moe mla/moe", noise=0.3)
    rows = some_rows(model, record=True)
    learner = updates_of(model, replay="sampler")
    known = 0
    for part in pack(rows, 3, 64):
        free, bound = Routing(), Routing(replay=part.experts)
        with torch.no_grad():
            want, got = (learner.logprobs(model, part, routing)[0] for routing in (free, bound))
        torch.testing.assert_close(got, want, rtol=0, atol=1e-4)
        assert part.experts is not None
        for given, chosen in zip(part.experts, free.experts, strict=True):
            there = given[..., 0] >= 0
            assert torch.equal(given[there].sort(-1).values, chosen[there].sort(-1).values)
            assert not (there & (part.positions < 0)).any()
            assert there[part.wanted].float().mean() > 0.99
            known += int(there.sum())
        swapped = Routing(replay=[(layer + 1) % 4 for layer in part.experts])  # the twin: other experts, other numbers
        with torch.no_grad():
            assert (learner.logprobs(model, part, swapped)[0] - want).abs().max() > 0.01
    assert known > 200
    last = learn(model, CHAT, [(Calls(), 1.0)], config(problems=8, replay="sampler", epochs=2), tmp_path)
    assert last["ratio/max_abs_log"] == 0.0 and last["mismatch/max_abs_log"] < 1e-4
    assert last["routing/agreement"] == 1.0


def test_what_the_engine_did_not_record_is_replayed_from_the_first_pass() -> None:
    model = make("gqa/moe*2", noise=0.3)
    whole = some_rows(model, record=True)
    rows = [replace(row, experts=()) if i % 2 else row for i, row in enumerate(whole)]
    learner = updates_of(model, replay="sampler", rows=2, length=64)
    batch = learner.minibatch(rows, range(len(rows)), torch.linspace(-1, 1, len(rows)))
    before = [part.experts for part in batch.parts]
    assert any(e is None or (e[0][part.positions >= 0] < 0).any() for e, part in zip(before, batch.parts, strict=True))
    learner.backward(batch, Seen())
    for given, part in zip(before, batch.parts, strict=True):
        assert part.experts is not None
        for layer, known in zip(part.experts, given or [], strict=given is not None):
            assert (layer >= 0).all() and torch.equal(layer[known >= 0], known[known >= 0])
        again = Routing(replay=part.experts)
        with torch.no_grad():
            got = learner.logprobs(model, part, again)[0]
        assert part.old is not None and torch.equal(got, part.old)


def test_later_updates_replay_or_not(tmp_path: Path) -> None:
    def ratio(replay: str) -> float:
        model = make("gqa/moe*2", noise=0.3)
        settings = config(replay=replay, epochs=4, muon_lr=0.01, objective="cispo")
        last = learn(model, CHAT, [(Digits(), 1.0)], settings, tmp_path / replay)
        assert ("routing/agreement" in last) == (replay == "sampler")
        return float(last["ratio/last_max_abs_log"])

    none, trainer, sampler = ratio("none"), ratio("trainer"), ratio("sampler")
    assert trainer == pytest.approx(sampler, rel=1e-2)  # in fp32 they choose alike
    assert abs(none - trainer) > 0.02 * trainer


def kl_to(model: Transformer, sampler: Transformer, replay: str) -> tuple[float, float]:
    """KL(sampler || trainer) a token, k3, and the agreement of their routers."""
    rows = some_rows(sampler, 60, record=replay == "sampler")
    learner = updates_of(model, replay=replay, mismatch_limit=float("inf"), muon_lr=0, adam_lr=0)
    values = learner.learn_from(rows, torch.linspace(-1, 1, len(rows)), 0)
    return values["mismatch/kl"], values.get("routing/agreement", 0.0)


def test_replaying_the_samplers_experts_halves_the_mismatch_of_bf16() -> None:
    model = make("gqa/moe*3", noise=0.5)
    sampler = copy.deepcopy(model).bfloat16()
    free, bound = kl_to(model, sampler, "none")[0], kl_to(model, sampler, "sampler")
    assert 0.8 < bound[1] < 0.999, "no choice flips, so this shows nothing"
    assert bound[0] < free / 2, (bound, free)  # a sixth to a sixteenth, in models like this one


def test_gates_stay_the_live_routers() -> None:
    model = make("gqa/moe*2", noise=0.3)
    learner = updates_of(model, replay="sampler")
    rows = some_rows(model, record=True)
    learner.backward(learner.minibatch(rows, range(len(rows)), torch.linspace(-1, 1, len(rows))), Seen())
    for layer in model.layers:
        assert layer.ffn.router.grad.norm() > 1e-5  # type: ignore[union-attr,operator]


def test_the_correlation_of_probabilities_is_pearsons_over_all_parts() -> None:
    rng, seen = np.random.default_rng(0), Seen()
    trainer = np.log(rng.uniform(0.01, 1, 90)).astype(np.float32)
    engine = (trainer + rng.normal(0, 0.1, 90)).astype(np.float32)
    stale = rng.uniform(size=90) < 0.3  # of older weights: they say nothing about the engine
    trainer[stale] -= 3
    for some in (slice(0, 30), slice(30, 90)):
        part = Packed(*[torch.zeros(0)] * 5, sampler=torch.tensor(engine[some]), stale=torch.tensor(stale[some]))
        seen.add(part, torch.tensor(trainer[some]), Routing())
    want = np.corrcoef(np.exp(trainer[~stale]), np.exp(engine[~stale]))[0, 1]
    assert seen.metrics["mismatch/correlation"] == pytest.approx(want, abs=1e-6) and 0.8 < want < 0.999
    assert np.corrcoef(np.exp(trainer), np.exp(engine))[0, 1] < want - 0.05  # the twin
    same = Seen()
    same.add(Packed(*[torch.zeros(0)] * 5, sampler=torch.full((3,), -1.0)), torch.full((3,), -1.0), Routing())
    assert "mismatch/correlation" not in same.metrics  # none is defined where nothing differs
