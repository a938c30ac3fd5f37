"""Who plays the episodes of a run: this process, Ray actors, or a server elsewhere."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from trivet.chat import Chat
from trivet.model import Transformer
from trivet.rl.config import RLConfig
from trivet.rl.remote import Remote
from trivet.rl.rewards import Reward
from trivet.rl.sampler import Sampler
from trivet.rl.workers import Workers
from trivet.tasks import Task


def make_sampler(
    model: Transformer, chat: Chat, tasks: Sequence[tuple[Task, float]], config: RLConfig,
    device: torch.device | str, rewards: tuple[Reward, ...] = (),
) -> Sampler:  # fmt: skip
    kind = Workers if config.workers else Remote if config.server is not None else Sampler
    return kind(model, chat, tasks, config, device, rewards)
