"""Environments written for the `verifiers` package: `verifiers:NAME` (pip install 'trivet[verifiers]').

    [[tasks]]
    name = "verifiers:my-env"        # what vf.load_environment is given
    args = { max_turns = 5 }         # and its arguments
    path = "./environments/my_env"   # where its module is, unless it is installed

Rows of its data set are the problems, its system prompt and examples the turns before the question, its tools what the
model may call. What it says to each turn, when an episode is over and what it is worth comes from the environment's
own code, which runs apart (`verifiers_worker.py`): it may hang or die, and it sets signal handlers of its own. The sum
of its rubric's weighted functions is the score, each function's value a part. A function that raises is an error (`verifiers`
itself makes it a 0), and one that takes too long a timeout.

Nothing is kept between calls: the environment is shown the whole transcript each time, and plays it again. So it must
say the same again, and one whose replies are slow gets slow with the square of its turns. What can't be had that way is
refused in a sentence: groups of environments, sandboxes, scores that compare several episodes, pictures.

Without a data set of its own for evaluation one row in eight is held out, by a hash of its prompt.
"""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from trivet.config import UserError
from trivet.messages import Message, Score, StopReason, ToolCall, ToolSpec
from trivet.spec import Frozen
from trivet.tasks.apart import call_apart
from trivet.tasks.base import Demo, Problem, Split, is_test, shuffled

ROWS_SECONDS = 600.0  # to write down all rows of a data set


class VerifiersConfig(Frozen):
    name: Literal["verifiers"] = "verifiers"
    env: str = Field(description="the environment's name, as vf.load_environment takes it")
    args: dict[str, Any] = Field(default_factory=dict, description="arguments of its load_environment")
    path: str | None = Field(default=None, description="folder of its module; unset: it is installed")
    thoughts: bool | None = Field(
        default=None, description="show it thoughts, in <think> tags; unset: where its parser is a ThinkParser"
    )
    seconds: float = Field(default=60.0, gt=0, description="that one reply or one score may take")


@dataclass(frozen=True)
class Foreign:
    """The World of one row: see messages.World."""

    function: str  # of the worker
    place: tuple[str, int]  # which data set, which row
    specs: tuple[ToolSpec, ...]
    thoughts: bool
    seconds: float

    def reply(self, transcript: Sequence[Message]) -> Sequence[Message] | Score:
        said = self._ask("reply", transcript)
        return said if isinstance(said, Score) else [message(turn) for turn in said]

    def grade(self, transcript: Sequence[Message]) -> Score:
        score = self._ask("grade", transcript)
        return score if isinstance(score, Score) else Score(0.0, "error", detail=f"no Score but {score!r:.80}")

    def _ask(self, what: str, transcript: Sequence[Message]) -> Any:
        turns = [plain(turn, self.thoughts) for turn in transcript]
        return call_apart(self.function, what, *self.place, turns, seconds=self.seconds)


class Verifiers:
    levels: tuple[int, ...] = (0,)

    def __init__(self, config: VerifiersConfig) -> None:
        self.config, self.name = config, f"verifiers:{config.env}"
        path = None if config.path is None else str(Path(config.path).resolve())
        made_with = json.dumps([config.env, config.args, path])
        self.function = f"trivet.tasks.verifiers_worker:opened {made_with}"
        with tempfile.TemporaryDirectory() as folder:
            found = call_apart(self.function, "describe", folder, seconds=ROWS_SECONDS)
            if isinstance(found, Score):
                raise UserError(f"{self.name}: its rows can't be read: {found.status}: {found.detail}")
            if "refused" in found:
                raise UserError(f"{self.name} can't be played here: {found['refused']}.")
            files = {name: Path(folder, name).read_text() for name in ("train", "eval")}
        rows = {name: [json.loads(line) for line in text.splitlines()] for name, text in files.items()}
        self.specs = tuple(ToolSpec(**spec) for spec in found["tools"])
        self.tools = tuple(spec.name for spec in self.specs) or ("world",) * (found["turns"] != 1)  # talks to it
        self.thoughts = found["thoughts"] if config.thoughts is None else config.thoughts
        if rows["train"] == rows["eval"]:
            held = {s: [r for r in rows["train"] if is_test(json.dumps(r["prompt"])) == (s == "test")] for s in SPLITS}
            self.rows, self.source = held, {"train": "train", "test": "train"}
        else:
            self.rows, self.source = {"train": rows["train"], "test": rows["eval"]}, {"train": "train", "test": "eval"}

    def problem(self, split: Split, index: int, level: int | None = None) -> Problem:
        rows = self.rows[split]
        if not rows:
            raise UserError(f"{self.name} has no {split} problems.")
        lap, at = divmod(index, len(rows))
        row = rows[shuffled(len(rows), f"{len(rows)} {lap}")[at] if split == "train" else at]
        *opening, question = [message(turn) for turn in row["prompt"]]
        place = self.source[split], row["row"]
        return Problem(
            f"{self.name}-{split}-{row['row']}", question.content, row["answer"], opening=tuple(opening),
            world=Foreign(self.function, place, self.specs, self.thoughts, self.config.seconds),
        )  # fmt: skip

    def demonstrate(self, problem: Problem, rng: random.Random) -> Demo:
        if self.tools or not problem.answer:
            raise UserError(f"{self.name} has no worked examples: learn it by RL, or from texts of your own.")
        return Demo((*problem.messages, Message("assistant", problem.answer)), thinking=False)

    def grade(self, problem: Problem, message: Message) -> Score:
        assert problem.world is not None
        return problem.world.grade([*problem.messages, message])


SPLITS: tuple[Split, ...] = ("train", "test")


# ------------------------------------------------------------------------------------------ messages
def plain(turn: Message, thoughts: bool) -> dict[str, Any]:
    """A message as the environment is shown it. A call that could not be understood stays the text that it is."""
    content = turn.content
    if thoughts and turn.reasoning is not None:
        content = f"<think>\n{turn.reasoning}\n</think>\n\n{content}"
    calls = [
        {"id": c.id, "name": c.name, "arguments": json.dumps(dict(c.arguments)) if c.error is None else c.text}
        for c in turn.tool_calls
    ]
    cut = turn.completion is not None and turn.completion.stop is StopReason.LENGTH
    return {
        "role": turn.role, "content": content, "reasoning": turn.reasoning, "calls": calls,
        "call": turn.tool_call_id, "cut": cut,
    }  # fmt: skip


def message(turn: Mapping[str, Any]) -> Message:
    """What the environment says, from the form of `plain`."""
    calls = tuple(ToolCall(c["id"], c["name"], json.loads(c["arguments"])) for c in turn["calls"])
    return Message(turn["role"], turn["content"], turn["reasoning"], calls, turn["call"])
