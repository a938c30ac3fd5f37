"""Runs of RL on one process and on several, for test_rl_together.py: `python rl_runs.py FOLDER JOBS`, as parallel_runs.py."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from parallel_runs import main
from test_rl_learner import CHAT, Calls, Digits, config, eager_caller, make
from test_rl_lora import adapted
from test_rl_sampler import HalfSolved
from trivet.config import UserError
from trivet.model import Transformer
from trivet.rl import together
from trivet.rl.learner import learn
from trivet.rl.rewards import make_rewards
from trivet.tasks import Problem
from trivet.train.loop import Interrupted
from trivet.train.parallel import Ranks, processes

REWARDS = [{"name": "length", "weight": 0.2, "limit": 30}]  # each process adds it to what it played
BASE = {
    "steps": 3,
    "problems": 5,
    "rows": 2,
    "muon_lr": 0.01,
    "adam_lr": 1e-3,
    "page_every": 1,
    "save_every_seconds": 1e9,
}
CASES: dict[str, dict[str, Any]] = {
    "dense": {},
    "moe": {"objective": "grpo", "epochs": 2, "minibatches": 2, "replay": "sampler", "top_p": 0.95},
    "lora": {"objective": "gspo", "epochs": 2, "problems": 2, "dynamic": 3},
    "tools": {"max_tokens": 40, "thinking": 6, "objective": "rloo"},
    "bf16": {"precision": "bf16", "mismatch_limit": 1.0},
}


def model_of(case: str) -> Transformer:
    if case == "lora":
        return adapted("mla/moe gqa/dense")
    if case == "tools":
        return eager_caller()
    return make("lightning/moe mla/moe gqa/dense" if case == "moe" else "gqa/dense", noise=0.3)


class Stopping(HalfSolved):
    """The last process is stopped, in one way or another, while it draws a problem."""

    def __init__(self, breaks: str, at: int | None) -> None:
        self.number, self.at, self.drawn = signal.SIGKILL if breaks == "killed" else signal.SIGTERM, at, 0

    def problem(self, split: str, index: int, level: int | None = None) -> Problem:
        self.drawn += 1
        if self.drawn == self.at and os.environ.get("RANK", "0") == os.environ.get("LAST", "0"):
            os.kill(os.getpid(), self.number)
        return super().problem(split, index, level)


def mean(ranks: Ranks, parameters: Any) -> None:
    """What is wrong and often done."""
    real_sum(ranks, parameters)
    for p in parameters:
        if p.grad is not None:
            p.grad /= ranks.world


real_sum = Ranks.sum_gradients


def refuse(*args: object) -> Any:
    raise UserError("this process has no room")


def run(out: Path, case: str, settings: dict[str, Any], breaks: str, stop_at: int | None) -> None:
    rank = int(os.environ.get("RANK", "0"))
    if breaks == "mean":
        Ranks.sum_gradients = mean  # type: ignore[method-assign]
    if breaks == "player" and rank == 1:
        together.play = refuse
    task = Calls() if case == "tools" else Stopping(breaks, stop_at)
    rewards = make_rewards(REWARDS) if case == "tools" else ()
    settings = {**BASE, **CASES[case], **settings}
    try:
        with processes(torch.device("cpu")) as device:
            model = model_of(case)
            learn(model, CHAT, [(task, 1.0), (Digits(), 1.0)], config(**settings), out, rewards=rewards, device=device)
    except (Interrupted, UserError) as e:
        out.mkdir(parents=True, exist_ok=True)
        (out / f"ended-{rank}").write_text(str(e))
        return
    save_file({n: t.contiguous() for n, t in model.state_dict().items()}, out / f"whole-{rank}.safetensors")


if __name__ == "__main__":
    main(run)
