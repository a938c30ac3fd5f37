"""Reward models: the loss by hand, packing that changes nothing, a taste that is learnt, files."""

from __future__ import annotations

import itertools
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from test_rl_learner import CHAT, make
from trivet.config import UserError
from trivet.messages import Message
from trivet.rl.preference import (
    Pair,
    PreferenceConfig,
    RewardModel,
    answer_ids,
    bradley_terry,
    load_reward_model,
    prefer,
    rewards,
    save_reward_model,
    score,
)  # fmt: skip


def test_the_loss_by_hand() -> None:
    loss = bradley_terry(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0]))
    by_hand = (-math.log(1 / (1 + math.exp(-1))) - math.log(1 / (1 + math.exp(2)))) / 2
    assert abs(loss.item() - by_hand) < 1e-6
    assert bradley_terry(torch.tensor([5.0]), torch.tensor([-5.0])) < 1e-3


def reward_model(seed: int = 0) -> RewardModel:
    model = RewardModel(make(noise=0.1))
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=g))
    return model


def question(text: str) -> tuple[Message, ...]:
    return (Message("user", text),)


@torch.no_grad()
def test_packed_rewards_are_those_of_each_alone() -> None:
    model = reward_model()
    sequences = [answer_ids(CHAT, question("1" * n), "23"[: 1 + n % 2]) for n in (1, 5, 2, 9, 3)]
    together = rewards(model, sequences, 24)
    alone = torch.cat([rewards(model, [ids], 24) for ids in sequences])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    assert (together - alone.roll(1)).abs().max() > 1e-3  # they differ, so their order matters
    with pytest.raises(UserError, match="raise length"):
        rewards(model, sequences, 8)


def test_a_thought_is_not_seen() -> None:
    ids = answer_ids(CHAT, question("12"), "3")
    assert ids[-1] == CHAT.end_id and CHAT.decode(ids).endswith("<think></think>3<end>")


def pairs(count: int, seed: int = 0, flip: float = 0.0) -> list[Pair]:
    """Raters like the larger digit, and err in a share of cases."""
    rng, made = random.Random(seed), []
    for _ in range(count):
        a, b = rng.sample(range(10), 2)
        a, b = (max(a, b), min(a, b)) if rng.random() >= flip else (min(a, b), max(a, b))
        made.append(Pair(question(str(rng.randrange(100, 1000))), str(a), str(b)))
    return made


def settings(**more: Any) -> PreferenceConfig:
    return PreferenceConfig.model_validate(
        {"steps": 60, "pairs": 32, "length": 64, "muon_lr": 0.02, "adam_lr": 0.01, "tensorboard": False} | more
    )


def test_a_taste_is_learnt_from_pairs_and_kept_in_files(tmp_path: Path) -> None:
    model = RewardModel(make(noise=0.1))
    found = prefer(model, CHAT, pairs(600, flip=0.1), settings(), tmp_path / "run")
    assert 0.8 < found["eval/accuracy"] < 1.0  # one in ten raters erred, so more is impossible
    given = score(model, CHAT, [(question("555"), str(d)) for d in range(10)])
    assert sum(a < b for a, b in itertools.pairwise(given)) >= 8 and -3 < given[0] < 0 < given[9] < 3
    (tmp_path / "model").mkdir()
    save_reward_model(model, CHAT, tmp_path / "model")
    back, chat = load_reward_model(tmp_path / "model")
    assert score(back, chat, [(question("555"), "7")]) == score(model, CHAT, [(question("555"), "7")])
    with pytest.raises(UserError, match="no reward model"):
        load_reward_model(tmp_path)


def test_resumed_it_ends_with_the_same_bits(tmp_path: Path) -> None:
    whole = RewardModel(make())
    prefer(whole, CHAT, pairs(100), settings(steps=6), tmp_path / "whole")
    seen: list[int] = []

    def stop(metrics: dict[str, Any]) -> None:
        seen.append(metrics["step"])
        if metrics["step"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prefer(
            RewardModel(make()),
            CHAT,
            pairs(100),
            settings(steps=6, save_every_seconds=0),
            tmp_path / "cut",
            progress=stop,
        )
    resumed = RewardModel(make())
    prefer(resumed, CHAT, pairs(100), settings(steps=6, save_every_seconds=0), tmp_path / "cut")
    assert all(torch.equal(t, resumed.state_dict()[n]) for n, t in whole.state_dict().items())
    assert resumed.mean == whole.mean
    with pytest.raises(UserError, match="data"):
        prefer(RewardModel(make()), CHAT, pairs(100, seed=1), settings(steps=6, save_every_seconds=0), tmp_path / "cut")
    with pytest.raises(UserError, match="hold out"):
        prefer(RewardModel(make()), CHAT, pairs(1), settings(), tmp_path / "few")
