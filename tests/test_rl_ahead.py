"""A batch ahead, in another process: exactly one step stale, the same every time, and gone when its parent is."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from test_chat_syntax import family
from test_rl_learner import CHAT, Broken, Calls, Digits, config, make
from trivet.config import UserError
from trivet.messages import Message
from trivet.model import Transformer
from trivet.rl import learner
from trivet.rl.ahead import Ahead
from trivet.rl.learner import TIMES, learn
from trivet.rl.sampler import Batch, Sampler


class Late(Sampler):
    """The definition: every batch by the weights of the step before, in this process."""

    def __init__(self, model: Transformer, *args: Any) -> None:
        super().__init__(make("gqa/moe", noise=0.3), *args[:4])
        self.now, self.before = model, {k: t.clone() for k, t in model.state_dict().items()}

    def sample(self, step: int) -> Batch:
        self.model.load_state_dict(self.before)
        batch = super().sample(step)
        self.before = {k: t.clone() for k, t in self.now.state_dict().items()}
        if step == 0:
            return batch
        return replace(batch, attempts=[replace(a, stale=(True,) * a.tokens) for a in batch.attempts])


def run(folder: Path, **changes: Any) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    logged: list[dict[str, Any]] = []
    model = make("gqa/moe", noise=0.3)
    settings = config(steps=4, problems=6, muon_lr=0.02, **changes)
    learn(model, CHAT, [(Digits(), 1.0), (Calls(), 1.0)], settings, folder, progress=logged.append)
    return [{k: v for k, v in line.items() if k not in TIMES} for line in logged], model.state_dict()


def test_it_is_one_step_behind_and_no_race(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, weights = run(tmp_path / "ahead", lag=1)
    none, other = run(tmp_path / "none", lag=0)
    monkeypatch.setattr(learner, "Ahead", Late)
    want, by_definition = run(tmp_path / "late", lag=1)
    assert ours == want and all(torch.equal(weights[k], by_definition[k]) for k in weights)
    assert ours[0] == none[0] and any(not torch.equal(weights[k], other[k]) for k in weights)  # the twin
    assert "stale/share" not in ours[0] and ours[0]["mismatch/max_abs_log"] > 0
    for line in ours[1:]:
        assert line["stale/share"] == 1 and line["stale/kl"] > 1e-6 and line["ratio/max_abs_log"] == 0


def test_what_goes_wrong_there_is_said_here(tmp_path: Path) -> None:
    sampler = Ahead(make(), CHAT, [(Broken(), 0.0)], config(lag=1), "cpu", tmp_path)
    with pytest.raises(UserError, match="RL needs tasks"):
        sampler.sample(0)
    assert sampler._process is not None
    sampler._process.kill()
    sampler._ask(0)
    with pytest.raises(UserError, match=r"process that samples died \(exit code -9\)"):
        sampler._hear()
    sampler.close()


def test_one_way_at_a_time() -> None:
    with pytest.raises(ValueError, match="two ways not to wait"):
        config(partial=0.5, lag=1)


@pytest.mark.parametrize("name", ["ours", "qwen3", "deepseek-r1"])
def test_a_chat_is_the_same_in_another_process(name: str) -> None:
    chat = CHAT if name == "ours" else family(name)
    there = pickle.loads(pickle.dumps(chat))
    said = [Message("user", "1+2=<think>"), Message("assistant", "3", "1+2")]
    assert there.render(said, generate=True) == chat.render(said, generate=True)
    assert there.markers == chat.markers and there.encode_text("<think>") == chat.encode_text("<think>")
