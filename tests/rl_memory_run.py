"""One step of RL in a process of its own: `python rl_memory_run.py < question.json > answer.json`.

{"spec": ..., "rl": ...} -> the bytes of its peak above what the libraries take, {"bytes": n}. Prompts fill what `length`
leaves beside `max_tokens`, and a model without training hardly ever ends an answer, so episodes are as long as a row. One
group has spread, so that the update learns from it alone.
"""

from __future__ import annotations

import itertools
import json
import sys
import tempfile
from pathlib import Path

import torch

from trivet.chat import tiny_chat
from trivet.measure.trial_run import WARM_UP, peak_bytes
from trivet.messages import Message, Score
from trivet.model import Transformer
from trivet.rl.config import RLConfig
from trivet.rl.learner import learn
from trivet.spec import ModelSpec
from trivet.tasks import Problem

CHAT = tiny_chat()


class Ones:
    name, tools, levels = "ones", (), (0,)

    def __init__(self, length: int) -> None:
        self.length, self.graded = length - 3, itertools.count()  # of the prompt, without its three tags

    def problem(self, split: str, index: int, level: int | None = None) -> Problem:
        return Problem(str(index), "1" * self.length, "1")

    def grade(self, problem: Problem, message: Message) -> Score:
        return Score(float(next(self.graded) == 0))


def run(spec: ModelSpec, config: RLConfig) -> None:
    with tempfile.TemporaryDirectory() as out:
        task = Ones(config.length - config.max_tokens)
        told = learn(Transformer(spec), CHAT, [(task, 1.0)], config, Path(out))  # type: ignore[list-item]
    assert told["trained_share"] > 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    asked, cpu = json.load(sys.stdin), torch.device("cpu")
    config = RLConfig(**asked["rl"])
    few = {"problems": 1, "group": 2, "rows": 2, "length": 32, "max_tokens": 4}
    run(WARM_UP.model_copy(update={"vocab_size": CHAT.vocab_size}), config.model_copy(update=few))
    Path("/proc/self/clear_refs").write_text("5")  # the peak of the warm-up is forgotten
    before = peak_bytes(cpu)
    run(ModelSpec(**asked["spec"]), config)
    json.dump({"bytes": peak_bytes(cpu) - before}, sys.stdout)
