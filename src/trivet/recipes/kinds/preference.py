"""A reward model from pairs of answers: `data.jsonl` of a `sample` stage, or your own file.

One JSON object a line: {"question": "..." or [messages], "chosen": "...", "rejected": "..."}.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from trivet.config import UserError, explain
from trivet.messages import Message
from trivet.model.lora import LoRA, merge
from trivet.recipes.adapted import result
from trivet.recipes.kinds.base import Context, StageBase, load_start
from trivet.rl.preference import Pair, PreferenceConfig, RewardModel, prefer, save_reward_model
from trivet.tasks.conversations import Line


class PreferenceStage(StageBase):
    """A reward model (Bradley-Terry), which RL takes as `[[rewards]] name = "model"`."""

    kind: Literal["preference"] = "preference"
    start: str = Field(description="stage or model directory whose layers it starts with")
    lora: LoRA | None = Field(
        default=None, description="train adapters of `start` and the head; merged when it is done"
    )
    pairs: str = Field(description="a `sample` stage with keep = 'pairs', or a JSONL file")
    preference: PreferenceConfig

    def inputs(self) -> set[str]:
        return {self.start, self.pairs}

    def reseeded(self, seed: int) -> Self:
        config = self.preference.model_copy(update={"seed": self.preference.seed + seed})
        return self.model_copy(update={"preference": config})


class _Line(BaseModel):
    model_config = ConfigDict(extra="ignore")
    question: str | list[dict[str, Any]]
    chosen: str
    rejected: str


def run(stage: PreferenceStage, context: Context) -> dict[str, Any]:
    _, backbone, chat = load_start(stage.start, stage.lora, stage.preference.seed, context)
    pairs = read_pairs(context.data(stage.pairs))
    model = RewardModel(backbone).to(context.device).train()
    summary = prefer(model, chat, pairs, stage.preference, context.out, progress=context.progress)
    merge(backbone)
    with result(context.out) as aside:
        save_reward_model(model, chat, aside)
    context.say(
        f"{context.out.name}: orders {summary['eval/accuracy']:.1%} of {summary['eval/pairs']:.0f} held-out pairs as the raters"
    )
    return summary


def read_pairs(path: Path) -> list[Pair]:
    """Raises UserError naming the first line that can't be used: pairs are few, and none is left out silently."""
    try:
        texts = [text for text in path.read_text().splitlines() if text.strip()]
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"The pairs in {str(path)!r} can't be read: {e}.") from None
    pairs = []
    for number, text in enumerate(texts, 1):
        try:
            line = _Line.model_validate(json.loads(text))
            pairs.append(Pair(_question(line.question), line.chosen, line.rejected))
        except ValidationError as e:
            raise UserError(f"{path} line {number}: {explain(e, _Line)}") from None
        except ValueError as e:
            raise UserError(f"{path} line {number}: {e}.") from None
    return pairs


def _question(given: str | list[dict[str, Any]]) -> tuple[Message, ...]:
    if isinstance(given, str):
        return (Message("user", given),)
    answer = {"role": "assistant", "content": ""}  # a conversation ends with one
    return Line.model_validate({"messages": [*given, answer]}).conversation()[:-1]
