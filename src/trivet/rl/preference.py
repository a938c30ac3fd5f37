"""A reward model: which of two answers do people prefer? (Bradley and Terry 1952; InstructGPT, 2203.02155)

    P(a before b) = sigmoid(r(x, a) - r(x, b)),     loss = -log P(chosen before rejected)

r is one number, a linear read-out of the model's last hidden state, where the answer ends. It sees the question and
the answer without its thought, as R1's helpfulness model does (2501.12948): a thought is there to be right, not
to be liked.

Only differences are trained, so a constant is free: `standard` holds the mean and the deviation of r over held-out
answers, and rewards are given in these units. A reward model is right where its pairs were and can be fooled elsewhere;
hold it against something that it did not see.

Left out: margins, ties, several raters.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from trivet.chat import Chat
from trivet.config import UserError
from trivet.disk import write_atomic
from trivet.hub.checkpoint import load_pair
from trivet.messages import Message
from trivet.model import Transformer, save_model
from trivet.model.io import save_tensors
from trivet.tasks.base import shuffled
from trivet.train.data import IGNORE, Document, first_fit, lay_out, stable_hash
from trivet.train.loop import Loop, Progress, RunConfig, identity_of
from trivet.train.optim import Optimizer, clip, schedule

HEAD, STANDARD = "reward_head.safetensors", "reward.json"


@dataclass(frozen=True)
class Pair:
    """Two answers to one question, of which the first was preferred."""

    question: tuple[Message, ...]
    chosen: str
    rejected: str


class PreferenceConfig(RunConfig):
    """How to train a reward model."""

    pairs: int = Field(default=32, gt=0, description="pairs of a step")
    length: int = Field(default=256, gt=0, description="token slots of a row; the longest question with its answer")
    muon_lr: float = Field(default=0.003, ge=0, description="learning rate of the matrices")
    adam_lr: float = Field(default=3e-4, ge=0, description="learning rate of everything else")
    clip: float = Field(default=1.0, gt=0, description="largest norm of the gradient; inf: never clip")
    held_out: int = Field(default=8, ge=2, description="one pair in so many is held out, by a hash of its question")
    seed: int = Field(default=0, description="order of the pairs")


class RewardModel(nn.Module):
    """A Transformer and one row that reads a number off its last hidden state."""

    def __init__(self, backbone: Transformer) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Parameter(torch.zeros(backbone.spec.d_model, device=backbone.embed.device))
        self.mean, self.deviation = 0.0, 1.0

    def forward(self, tokens: Tensor, positions: Tensor, ends: Tensor) -> Tensor:
        """tokens, positions [B,T], ends [B,T] bool: last tokens of answers -> r [N], in row-major order of `ends`."""
        hidden = self.backbone(tokens, positions)[ends]  # [N,D]
        return hidden.float() @ self.head.float()

    def optimizer_groups(self) -> dict[str, dict[str, nn.Parameter]]:
        groups = self.backbone.optimizer_groups()
        return {**groups, "others": {**groups["others"], "reward": self.head}}


def answer_ids(chat: Chat, question: Sequence[Message], answer: str) -> list[int]:
    """What a reward model reads: the question and the answer, its thinking shut."""
    return chat.render([*question, Message("assistant", answer)], thinking=False).ids


def rewards(model: RewardModel, sequences: Sequence[Sequence[int]], length: int) -> Tensor:
    """r of each sequence [N], packed into rows of `length`; gradients flow. UserError for one that is too long."""
    longest = max(map(len, sequences))
    if longest > length:
        raise UserError(f"A question with its answer has {longest} tokens, more than a row of {length}: raise length.")
    lines = first_fit([len(ids) for ids in sequences], length)
    # A last token is only ever a target: one more lets the model read the real last one, and marks where that is.
    documents = [[Document([*sequences[i], 0], [False] * len(sequences[i]) + [True]) for i in line] for line in lines]
    batch = lay_out(documents, length).to(model.head.device)
    values = model(batch.tokens, batch.positions, batch.targets != IGNORE)
    places = torch.tensor([i for line in lines for i in line], device=values.device)
    return torch.empty_like(values).index_put((places,), values)


def bradley_terry(chosen: Tensor, rejected: Tensor) -> Tensor:
    """-log sigmoid(r_chosen - r_rejected), mean over pairs."""
    return -F.logsigmoid(chosen - rejected).mean()


def prefer(
    model: RewardModel,
    chat: Chat,
    pairs: Sequence[Pair],
    config: PreferenceConfig,
    out: Path,
    *,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train `model` in place -> the last metrics, with the accuracy on held-out pairs. Resumes from `out`/resume."""
    read = [
        (answer_ids(chat, p.question, p.chosen), answer_ids(chat, p.question, p.rejected), _held_out(p, config))
        for p in pairs
    ]
    learnt, held = ([(a, b) for a, b, h in read if h is which] for which in (False, True))
    if not learnt or not held:
        raise UserError(f"{len(pairs)} pairs leave {len(learnt)} to learn from and {len(held)} to hold out: give more.")
    optimizer = Optimizer(model.optimizer_groups(), config.muon_lr, config.adam_lr)
    identity = {
        **config.identity(),
        **identity_of(model.backbone),
        "data": stable_hash(*(t for a, b in learnt for t in (*a, -1, *b, -2))),
    }
    loop = Loop(model, optimizer, config, out, identity)

    def one_step(step: int) -> dict[str, Any]:
        places = (divmod(step * config.pairs + i, len(learnt)) for i in range(config.pairs))
        drawn = [learnt[shuffled(len(learnt), stable_hash(config.seed, len(learnt), lap))[at]] for lap, at in places]
        values = rewards(model, [ids for pair in drawn for ids in pair], config.length)
        chosen, rejected = values[0::2], values[1::2]
        loss = bradley_terry(chosen, rejected)
        loss.backward()
        norm = clip(optimizer.parameters(), config.clip)
        optimizer.step(schedule(step, config.steps, decay_share=1.0))
        optimizer.zero_grad()
        right = (chosen > rejected).float().mean()
        return {"loss": loss.item(), "accuracy": right.item(), "grad_norm": norm.item()}

    metrics = loop.run(one_step, progress)
    return metrics | check(model, held, config.length)


@torch.no_grad()
def check(model: RewardModel, held: Sequence[tuple[list[int], list[int]]], length: int) -> dict[str, float]:
    """Held-out pairs that the model orders as people did; sets the units in which it gives rewards."""
    values = rewards(model, [ids for pair in held for ids in pair], length)
    model.mean, model.deviation = values.mean().item(), max(values.std().item(), 1e-6)
    chosen, rejected = values[0::2], values[1::2]
    right = ((chosen > rejected).float() + 0.5 * (chosen == rejected).float()).mean().item()
    return {"eval/accuracy": right, "eval/loss": bradley_terry(chosen, rejected).item(), "eval/pairs": float(len(held))}


def save_reward_model(model: RewardModel, chat: Chat, directory: Path) -> None:
    """A model directory, with the head and the units beside it."""
    save_model(model.backbone, directory)
    chat.save(directory)
    save_tensors({"weight": model.head.detach()}, directory / HEAD)
    write_atomic(directory / STANDARD, json.dumps({"mean": model.mean, "deviation": model.deviation}) + "\n")


def load_reward_model(directory: Path, device: torch.device | str = "cpu") -> tuple[RewardModel, Chat]:
    """Raises UserError where the directory is not one that `save_reward_model` wrote."""
    missing = [name for name in (HEAD, STANDARD) if not (directory / name).is_file()]
    if missing:
        raise UserError(f"{directory} is no reward model: it has no {missing[0]}. A `preference` stage makes one.")
    backbone, chat = load_pair(directory, device, torch.float32)
    model = RewardModel(backbone)
    with torch.no_grad():
        model.head.copy_(load_file(directory / HEAD)["weight"])
    standard = json.loads((directory / STANDARD).read_text())
    model.mean, model.deviation = standard["mean"], standard["deviation"]
    return model.eval(), chat


@torch.no_grad()
def score(model: RewardModel, chat: Chat, answers: Sequence[tuple[Sequence[Message], str]]) -> list[float]:
    """(question, answer) -> reward in standard units: 0 is as good as the mean held-out answer."""
    if not answers:
        return []
    sequences = [answer_ids(chat, question, answer) for question, answer in answers]
    values = rewards(model, sequences, max(512, *map(len, sequences)))
    return ((values - model.mean) / model.deviation).tolist()


def _held_out(pair: Pair, config: PreferenceConfig) -> bool:
    """By the question, so that no question is on both sides."""
    text = "\n".join(message.content for message in pair.question)
    return stable_hash(*text.encode()) % config.held_out == 0
