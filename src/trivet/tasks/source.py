"""Problems from rows of a file: reading, splitting, worked examples. What an answer is, subclasses say.

Without a test file, one row in eight is held out by a hash of its question. Rows that can't be read are errors, up
to a share that is counted. Examples without reasoning teach to answer with the thinking block shut.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import Field

from trivet.config import UserError, nearest
from trivet.messages import Message
from trivet.spec import Frozen
from trivet.tasks.base import Demo, Problem, Split, is_test, shuffled
from trivet.tasks.tables import Row, read_rows


class SourceConfig(Frozen):
    path: str = Field(description="the file to learn from")
    test_path: str | None = Field(default=None, description="held-out file; None: a share of `path`")
    question: str = Field(default="question", description="key of the question")
    answer: str = Field(default="answer", description="key of the answer")
    reasoning: str | None = Field(default=None, description="key of the reasoning to imitate, if there is one")
    instruction: str | None = Field(default=None, description="a sentence after every question")
    no_think: float = Field(default=0.1, ge=0, le=1, description="share of examples that answer without thinking")
    bad_share: float = Field(default=0.01, ge=0, le=1, description="unreadable rows that are put up with")
    max_chars: int | None = Field(default=None, gt=0, description="skip (and count) longer examples")


@dataclass(frozen=True)
class Reference:
    """A row's answer, what stands below its question, and what goes with them."""

    answer: str
    shown: str = ""
    reasoning: str | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)


class Source:
    """Problems from rows of a file. A subclass says what a row's answer is, how it is written and graded."""

    tools: tuple[str, ...] = ()
    levels: tuple[int, ...] = (0,)

    def __init__(self, config: Any) -> None:
        self.config = config
        self.name: str = config.name
        rows = self._usable(config.path, self.read(config.path, "train"))
        held_out = self.held_out()
        if held_out is not None:
            self.rows = {"train": rows, "test": self._usable(config.test_path or config.path, held_out)}
        else:
            self.rows = {s: [r for r in rows if is_test(r["question"]) == (s == "test")] for s in ("train", "test")}
        for split, found in self.rows.items():
            if not found:
                raise UserError(
                    f"{config.path} leaves no {split} problems ({len(rows)} lines in all); give more or a test_path."
                )

    def problem(self, split: Split, index: int, level: int | None = None) -> Problem:
        rows = self.rows[split]
        lap, at = divmod(index, len(rows))
        row = rows[shuffled(len(rows), f"{len(rows)} {lap}")[at] if split == "train" else at]
        return Problem(f"{self.name}-{split}-{row['number']}", row["prompt"], row["answer"], 0, row["meta"])

    def demonstrate(self, problem: Problem, rng: random.Random) -> Demo:
        user = Message("user", problem.prompt)
        reasoning = problem.meta["reasoning"]
        if reasoning is None or rng.random() < self.config.no_think:
            return Demo((user, Message("assistant", self.written(problem.answer))), thinking=False)
        return Demo((user, Message("assistant", self.written(problem.answer), reasoning)))

    # --- what a subclass says ------------------------------------------------------------------------
    def read(self, path: str, split: Split) -> list[Row]:
        return read_rows(Path(path))

    def held_out(self) -> list[Row] | None:
        return None if self.config.test_path is None else self.read(self.config.test_path, "test")

    def reference(self, data: dict[str, Any]) -> Reference | str:
        """The answer of a row whose keys are there; or what is wrong with it."""
        raise NotImplementedError

    def written(self, answer: str) -> str:
        """The answer as a worked example gives it."""
        return answer

    # --- reading -------------------------------------------------------------------------------------
    def _usable(self, path: str, found: list[Row]) -> list[dict[str, Any]]:
        rows, bad, long = [], [], 0
        for number, (place, data) in enumerate(found, 1):
            row = data if isinstance(data, str) else self._row(data, number)
            if isinstance(row, str):
                bad.append(f"{place}: {row}")
            elif (
                self.config.max_chars
                and len(row["prompt"]) + len(row["meta"]["reasoning"] or "") > self.config.max_chars
            ):
                long += 1
            else:
                rows.append(row)
        if len(bad) > self.config.bad_share * len(found):
            raise UserError(f"{path}: {len(bad)} of {len(found)} lines can't be used; {bad[0]}")
        for what, count in ((f"can't be used, first {bad[0] if bad else ''}", len(bad)), ("are over max_chars", long)):
            if count:
                warnings.warn(f"{path}: {count} of {len(found)} lines {what}; they are left out.", stacklevel=4)
        return rows

    def _row(self, data: dict[str, Any], number: int) -> dict[str, Any] | str:
        """The row as the task needs it, or what is wrong with it."""
        c = self.config
        for key in filter(None, (c.question, c.answer, c.reasoning)):
            if key not in data:
                return f"no key {key!r}.{nearest(key, data)}"
            if not isinstance(data[key], str | int | float):
                return f"{key!r} is neither text nor a number."
        made = self.reference(data)
        if isinstance(made, str):
            return made
        question = str(data[c.question])
        prompt = "\n\n".join(filter(None, (question, made.shown, c.instruction)))
        reasoning = str(data[c.reasoning]) if c.reasoning else made.reasoning
        meta = {"reasoning": reasoning, **made.meta}
        return {"question": question, "prompt": prompt, "answer": made.answer, "meta": meta, "number": number}
