"""Rows that share their prompt: packed once, learnt from as if each had its own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from test_rl_epochs import HYBRID
from test_rl_exact import LAYERS, plain
from test_rl_learner import CHAT, Calls, config, make
from trivet.agent.loop import Row
from trivet.engine import Engine
from trivet.messages import Sampling
from trivet.model import Routing, Transformer
from trivet.rl.epochs import Seen
from trivet.rl.learner import _Run, learn
from trivet.rl.rollout import Job, play
from trivet.rl.update import pack
from trivet.train.data import PADDING

GROUPS, SIZE = 3, 5


def groups(model: Transformer, **engine: Any) -> list[Row]:
    """Episodes of some turns and calls, five to a problem."""
    jobs: Any = [
        Job(Calls(), Calls().problem("train", g), Sampling(max_tokens=20, seed=100 * g + i, thinking=6))  # type: ignore[arg-type]
        for g in range(GROUPS) for i in range(SIZE)
    ]  # fmt: skip
    return [attempt.row for attempt in play(Engine(model.eval(), CHAT, 8, 65, **engine), jobs, 3)]


def gradients(model: Transformer, rows: list[Row], **changes: Any) -> tuple[dict[str, Tensor], dict[str, float]]:
    updates = _Run(model, CHAT, [], config(rows=3, length=128, **changes), Path("nowhere"), "cpu").updates
    batch = updates.minibatch(rows, range(len(rows)), torch.linspace(-1, 1, len(rows)))
    seen = Seen()
    updates.backward(batch, seen)
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found, seen.metrics


@pytest.mark.parametrize("kind", LAYERS)
def test_the_gradient_is_that_of_rows_with_prompts_of_their_own(kind: str) -> None:
    model = make(LAYERS[kind], noise=0.3)
    rows = groups(model)
    (shared, seen), (apart, _) = (gradients(model, rows, share_prompts=share) for share in (True, False))
    scale = max(float(g.abs().max()) for g in apart.values())
    assert shared.keys() == apart.keys() and scale > 1e-3
    exact = 3e-4 if kind == "delta" else 1e-5  # keys of unit length made of what is near 0; in fp64 they agree to 2e-13
    assert all(float((shared[n] - apart[n]).abs().max()) < exact * scale for n in apart)
    assert seen["mismatch/max_abs_log"] < 1e-4  # nor does the engine see another distribution
    # the twin: rows that share a prompt which is not theirs
    foreign = [replace(row, ids=(row.ids[0], row.ids[1] + i % SIZE, *row.ids[2:])) for i, row in enumerate(rows)]
    other, _ = gradients(model, foreign)
    assert max(float((other[n] - apart[n]).abs().max()) for n in apart) > 1e-2 * scale


def test_a_prompt_is_there_once_but_for_its_last_token() -> None:
    rows = groups(make(HYBRID, noise=0.3))
    prompts = [row.trained.index(True) for row in rows]
    ends = [max(i for i, t in enumerate(row.trained) if t) for row in rows]  # inputs of a row
    (part,) = pack(rows, 64, 1000)
    (twin,) = pack(rows, 64, 1000, share=False)
    firsts = [max(range(g, g + SIZE), key=lambda i: ends[i]) for g in range(0, len(rows), SIZE)]
    saved = sum(prompts[i] - 1 for i in range(len(rows)) if i not in firsts)
    assert int((twin.positions != PADDING).sum()) == sum(ends)
    assert int((part.positions != PADDING).sum()) == sum(ends) - saved and saved > sum(ends) / 10
    for packed in (part, twin):
        wrote = [packed.targets[packed.sequence == i].tolist() for i in range(len(rows))]
        assert wrote == [[t for t, own in zip(r.ids, r.trained, strict=True) if own] for r in rows]


@pytest.mark.parametrize(("lines", "length"), [(1, 40), (1, 64), (2, 30), (3, 100)])
def test_lines_hold_whole_groups_or_begin_anew(lines: int, length: int) -> None:
    model = make("gqa/dense lightning/dense", noise=0.3)
    rows = groups(model)
    updates = _Run(model, CHAT, [], config(rows=lines, length=length), Path("nowhere"), "cpu").updates
    seen = set[int]()
    parts = pack(rows, lines, length)
    assert all(p.tokens.numel() <= lines * length for p in parts)
    assert parts[0].tokens.shape[1] == max(p.tokens.shape[1] for p in parts)
    for part in parts:
        with torch.no_grad():
            got = updates.logprobs(model, part, Routing())[0]
        for i in set(part.sequence.tolist()):
            torch.testing.assert_close(got[part.sequence == i], plain(model, rows[i], 1.0), rtol=0, atol=2e-5)
            seen.add(i)
    assert seen == set(range(len(rows)))


def test_recorded_experts_stay_with_their_tokens() -> None:
    model = make("gqa/moe lightning/moe", noise=0.3)
    rows = groups(model, record_experts=True, prefix_bytes=2**20)
    (part,) = pack(rows, 64, 1000)
    assert part.experts is not None and part.apart is not None
    routing = Routing(replay=part.experts)
    with torch.no_grad():
        model(part.tokens, part.positions, routing=routing, apart=part.apart)
    assert min(_agreement(given, own) for given, own in zip(part.experts, routing.own, strict=True)) > 0.999
    moved = [layer.roll(1, 1) for layer in part.experts]  # the twin: one token off
    assert max(_agreement(given, own) for given, own in zip(moved, routing.own, strict=True)) < 0.9


def _agreement(given: Tensor, own: Tensor) -> float:
    known = given[..., 0] >= 0
    return float((given[known].unsqueeze(-1) == own[known].unsqueeze(-2)).any(-1).float().mean())


def test_minibatches_epochs_and_a_reference_run_on_shared_prompts(tmp_path: Path) -> None:
    steps = config(problems=8, epochs=2, minibatches=3, objective="grpo", muon_lr=0, adam_lr=0)
    last = learn(make(HYBRID, noise=0.3), CHAT, [(Calls(), 1.0)], steps, tmp_path)
    assert last["ratio/max_abs_log"] == last["ratio/last_max_abs_log"] == 0.0
    assert last["kl"] == 0.0 and last["grad_norm"] > 0 and 0 < last["mismatch/max_abs_log"] < 1e-4
