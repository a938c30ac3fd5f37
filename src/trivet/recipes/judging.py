"""Reward terms that need a model: the table of all terms, with these opened from a directory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field

from trivet.engine import Engine, EngineModel
from trivet.hub.checkpoint import load_pair
from trivet.messages import Score
from trivet.rl.endpoint import Endpoint
from trivet.rl.judge import JudgeConfig, judge_term
from trivet.rl.preference import load_reward_model, score
from trivet.rl.rewards import TERMS, Row
from trivet.rl.terms import Case, Term
from trivet.spec import Frozen


class ModelConfig(Frozen):
    """A reward model's view of the answer, in standard deviations from its mean over held-out answers; no bounds."""

    name: Literal["model"] = "model"
    model: str = Field(description="a `preference` stage, or its directory")


ROWS = 32  # answers that a judge reads at the same time


def known_rewards(find: Callable[[str], Path], device: torch.device) -> Mapping[str, Row]:
    """`TERMS` and those whose model `find` gives the directory of."""

    def judge(config: JudgeConfig) -> Term:
        if config.server is not None:
            endpoint = Endpoint("judge.server", config.server, config.model)
            return judge_term(config, endpoint, endpoint.run)
        model, chat = load_pair(find(config.model), device, torch.float32)
        answerer = EngineModel(Engine(model.eval(), chat, ROWS, model.spec.context_length, device), chat)
        return judge_term(config, answerer, answerer.run)

    def model(config: ModelConfig) -> Term:
        reward_model, chat = load_reward_model(find(config.model), device)

        def term(cases: Sequence[Case]) -> list[Score]:
            answers = [(case.problem.messages, case.episode.final.content) for case in cases]
            return [Score(value) for value in score(reward_model, chat, answers)]

        return term

    return {**TERMS, "judge": (JudgeConfig, judge), "model": (ModelConfig, model)}
