"""Reward terms that need a model: the table of all terms, with these opened from a directory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from trivet.engine import Engine, EngineModel
from trivet.hub.checkpoint import load_pair
from trivet.rl.judge import JudgeConfig, judge_term
from trivet.rl.rewards import TERMS, Row
from trivet.rl.terms import Term

ROWS = 32  # answers that a judge reads at the same time


def known_rewards(find: Callable[[str], Path], device: torch.device) -> Mapping[str, Row]:
    """`TERMS` and those whose model `find` gives the directory of."""

    def judge(config: JudgeConfig) -> Term:
        model, chat = load_pair(find(config.model), device, torch.float32)
        answerer = EngineModel(Engine(model.eval(), chat, ROWS, model.spec.context_length, device), chat)
        return judge_term(config, answerer, answerer.run)

    return {**TERMS, "judge": (JudgeConfig, judge)}
