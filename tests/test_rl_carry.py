"""Episodes that outlive a step: nothing is lost, nothing is written twice, and every token knows its policy."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from test_rl_learner import CHAT, Calls, Digits, config, eager_caller
from trivet.agent.loop import Row
from trivet.model import Transformer
from trivet.rl.learner import learn
from trivet.rl.rollout import Attempt, play
from trivet.rl.sampler import Sampler
from trivet.rl.update import pack

STEPS = 4


def sampler_of(model: Transformer, **changes: Any) -> Sampler:
    settings = config(**{"problems": 5, "group": 4, "max_tokens": 40, "length": 100, "partial": 0.4} | changes)
    return Sampler(model, CHAT, [(Calls(), 1.0), (Digits(), 1.0)], settings, "cpu")


def run(sampler: Sampler, steps: int = STEPS, scale: float = 1.0) -> list[list[Attempt]]:
    """Batches of some steps; between two of them all weights are multiplied by `scale`."""
    batches = []
    for step in range(steps):
        batches.append(sampler.sample(step).attempts)
        with torch.no_grad():
            for p in sampler.model.parameters():
                p.mul_(scale)
    return batches


def facts(attempt: Attempt) -> Any:
    sets = [[part.tolist() for part in known] for _, known in attempt.row.sets]
    return replace(attempt.row, sets=()), sets, attempt.score, attempt.stale, tokens_of(attempt)


def tokens_of(attempt: Attempt) -> list[tuple[int, ...]]:
    return [completion.tokens for completion in attempt.episode.completions]


@pytest.mark.parametrize("changes", [{}, {"max_rows": 3}, {"thinking": 4, "top_k": 20}], ids=str)
def test_episodes_are_what_they_would_have_been(changes: dict[str, Any]) -> None:
    """By weights that do not change, against the same jobs played without a stop."""
    sampler = sampler_of(eager_caller(), **changes)
    batches = run(sampler)
    found = [attempt for batch in batches for attempt in batch]
    whole = {
        a.job.sampling.seed: a
        for step in range(STEPS)
        for a in play(sampler._engine(20), sampler._jobs(step, 0, 5), sampler.config.max_turns)
    }
    assert len({a.job.sampling.seed for a in found}) == len(found)  # each once
    for attempt in found:
        want = whole[attempt.job.sampling.seed]
        assert tokens_of(attempt) == tokens_of(want) and attempt.job == want.job
        assert (attempt.episode.stop, attempt.score) == (want.episode.stop, want.score)
        assert attempt.row.trained == want.row.trained and attempt.row.ids == want.row.ids
    for batch in batches:  # whole groups, one after the other
        problems = [a.job.problem for a in batch]
        assert batch and all(problems[i] == problems[i - i % 4] for i in range(len(batch)))
    assert any(any(a.row.stale) for a in found) and not any(any(a.row.stale) for a in batches[0])
    assert any(a.calls_tool and any(a.row.stale) for a in found)
    started = {s.key for s in sampler.carried}
    assert len(started) + len(found) == STEPS * 20 and (started or changes)  # nothing is lost


def test_every_token_is_of_the_weights_that_it_says() -> None:
    """Log-probabilities against forward passes by the weights of each step."""
    scale = 1.15
    found = [a for batch in run(sampler_of(eager_caller(), problems=16), steps=2, scale=scale)[1:] for a in batch]
    models = [eager_caller(), eager_caller()]
    with torch.no_grad():
        for p in models[1].parameters():
            p.mul_(scale)

    def away(row: Row, model: Transformer) -> torch.Tensor:
        logp = model.logits(model(torch.tensor([row.ids]))[0, :-1]).float().log_softmax(-1)
        return (logp.gather(-1, torch.tensor(row.ids)[1:, None])[:, 0] - torch.tensor(row.logprobs)[1:]).abs()

    mixed, wrong = 0, 0.0
    for row in (attempt.row for attempt in found):
        trained = torch.tensor(row.trained)[1:]
        stale = torch.tensor(row.stale or [False] * len(row.ids))[1:]
        old, new = (away(row, model) for model in models)
        if (stale & trained).any():
            assert old[stale & trained].max() < 1e-3
            wrong = max(wrong, new[stale & trained].max().item())
        if (~stale & trained).any():
            assert new[~stale & trained].max() < 1e-3
        mixed += bool((stale & trained).any() and (~stale & trained).any())
    assert mixed > 1 and wrong > 0.05  # the twin: by the present weights they would be others


def test_records_come_back_as_they_were() -> None:
    """What is saved is all: a sampler that loads it goes on as the one that did not stop."""
    for changes in ({}, {"top_p": 0.8}):
        straight, first = (sampler_of(eager_caller(), **changes) for _ in range(2))
        want = run(straight, 3)
        run(first, 2)
        records = first.dump(2)
        again = sampler_of(eager_caller(), **changes)
        again.load(2, records)
        assert again.dump(2) == records and any('"score": null' in record for record in records)
        assert any('"stop": "tool_call"' in record for record in records)
        got = again.sample(2).attempts
        assert [facts(a) for a in got] == [facts(a) for a in want[2]]
        broken = sampler_of(eager_caller(), **changes)  # the twin: without the records it does not
        assert [a.row.ids for a in broken.sample(2).attempts] != [a.row.ids for a in want[2]]


def test_stale_tokens_are_marked_where_they_are_packed() -> None:
    row = Row((1, 2, 3, 4, 5), (False, True, True, False, True), (0.0, -1.0, -2.0, 0.0, -3.0),
              stale=(False, True, True, False, False))  # fmt: skip
    other = Row((1, 2, 3), (False, True, True), (0.0, -4.0, -5.0))
    (part,) = pack([other, row], 4, 20)
    assert part.stale is not None and part.stale.tolist() == [True, True, False, False, False]
    assert part.sampler.tolist() == [-1, -2, -3, -4, -5]
    (fresh,) = pack([other], 4, 20)
    assert fresh.stale is None


@pytest.mark.parametrize("objective", ["dapo", "gspo"])
def test_learning_counts_what_is_stale(objective: str, tmp_path: Path) -> None:
    logged: list[dict[str, Any]] = []
    settings = config(
        steps=4, problems=12, max_tokens=40, length=100, partial=0.5, muon_lr=0.02, objective=objective, epochs=2
    )
    learn(eager_caller(), CHAT, [(Calls(), 1.0)], settings, tmp_path, progress=logged.append)
    learnt = [line for line in logged if "loss" in line]  # a step's few complete groups may all agree
    assert all(line["ratio/max_abs_log"] == 0 and line["mismatch/kl"] < 1e-6 for line in learnt)
    late = [line for line in logged if "stale/share" in line]
    assert len(late) > 1 and all(0 < line["stale/share"] < 1 and line["stale/kl"] > 1e-6 for line in late)
    assert max(line["stale/steps"] for line in logged) >= 1 and all(line["carried"] > 0 for line in logged)
    assert "stale/share" not in logged[0]


def test_one_way_at_a_time() -> None:
    with pytest.raises(ValueError, match="either `partial` or `dynamic`"):
        config(partial=0.5, dynamic=2)
