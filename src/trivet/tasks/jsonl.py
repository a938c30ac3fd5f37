"""Your own questions and answers, one JSON object a line: {"question": ..., "answer": ...}.

How the reference answer is found in the `answer` field, and the model's answer in its text:

    text     the whole field; graded by equality without case and outer white space
    number   the last number; graded by value (1,000 = 1000.0 = $1000, 50% = 50)
    boxed    the last \\boxed{...}; graded as numbers where both are, else as text
    gsm8k    the number after `####`; what stands before it is the reasoning, <<...>> marks removed
    math     as boxed, graded by math-verify in symbols (pip install 'trivet[tasks]')

Without a test file, one line in eight is held out by a hash of its question. Lines that can't be
read are counted, and too many of them are an error, never a silent loss.
"""

from __future__ import annotations

import json
import random
import re
import warnings
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from trivet.config import UserError, nearest
from trivet.messages import Message, Score
from trivet.spec import Frozen
from trivet.tasks.base import Demo, Problem, Split, is_test

Format = Literal["text", "number", "boxed", "gsm8k", "math"]
NUMBER = re.compile(r"-?\$?(?:\d[\d,]*(?:\.\d+)?|\.\d+)%?")


class JsonlConfig(Frozen):
    name: Literal["jsonl"] = "jsonl"
    path: str = Field(description="the file to learn from")
    test_path: str | None = Field(default=None, description="held-out file; None: a share of `path`")
    format: Format = Field(default="text", description="how answers are written and compared")
    question: str = Field(default="question", description="key of the question")
    answer: str = Field(default="answer", description="key of the answer")
    reasoning: str | None = Field(default=None, description="key of the reasoning to imitate, if there is one")
    no_think: float = Field(default=0.1, ge=0, le=1, description="share of examples that answer without thinking")
    bad_share: float = Field(default=0.01, ge=0, le=1, description="unreadable lines that are put up with")
    max_chars: int | None = Field(default=None, gt=0, description="skip (and count) longer examples")


class Jsonl:
    tools: tuple[str, ...] = ()
    levels: tuple[int, ...] = (0,)

    def __init__(self, config: JsonlConfig) -> None:
        self.config = config
        self.name: str = config.name
        rows = self._read(config.path)
        if config.test_path is not None:
            self.rows = {"train": rows, "test": self._read(config.test_path)}
        else:
            self.rows = {s: [r for r in rows if is_test(r["prompt"]) == (s == "test")] for s in ("train", "test")}
        for split, found in self.rows.items():
            if not found:
                raise UserError(
                    f"{config.path} leaves no {split} problems ({len(rows)} lines in all); give more or a test_path."
                )

    def problem(self, split: Split, index: int, level: int | None = None) -> Problem:
        rows = self.rows[split]
        lap, at = divmod(index, len(rows))
        row = rows[_shuffled(len(rows), lap)[at] if split == "train" else at]
        return Problem(f"jsonl-{split}-{row['line']}", row["prompt"], row["answer"], 0, {"reasoning": row["reasoning"]})

    def demonstrate(self, problem: Problem, rng: random.Random) -> Demo:
        user = Message("user", problem.prompt)
        reasoning = problem.meta["reasoning"]
        if reasoning is None or rng.random() < self.config.no_think:
            return Demo((user, Message("assistant", self._written(problem.answer))), thinking=False)
        return Demo((user, Message("assistant", self._written(problem.answer), reasoning)))

    def grade(self, problem: Problem, message: Message) -> Score:
        if self.config.format == "math":
            return grade_math(problem.answer, message.content)
        given = extract(message.content, "number" if self.config.format == "gsm8k" else self.config.format)
        if given is None:
            return Score(0.0, detail="no answer found in the text")
        return Score(float(same(given, problem.answer)))

    def _written(self, answer: str) -> str:
        return f"\\boxed{{{answer}}}" if self.config.format in ("boxed", "math") else answer

    def _read(self, path: str) -> list[dict[str, Any]]:
        try:
            lines = Path(path).read_text().splitlines()
        except (OSError, UnicodeDecodeError) as e:
            raise UserError(f"The examples in {path!r} can't be read: {e}.") from None
        rows, bad, long = [], [], 0
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            row = self._row(line, number)
            if isinstance(row, str):
                bad.append(f"line {number}: {row}")
            elif self.config.max_chars and len(row["prompt"]) + len(row["reasoning"] or "") > self.config.max_chars:
                long += 1
            else:
                rows.append(row)
        if len(bad) > self.config.bad_share * len(lines):
            raise UserError(f"{path}: {len(bad)} of {len(lines)} lines can't be used; {bad[0]}")
        for what, count in ((f"can't be used, first {bad[0] if bad else ''}", len(bad)), ("are over max_chars", long)):
            if count:
                warnings.warn(f"{path}: {count} of {len(lines)} lines {what}; they are left out.", stacklevel=3)
        return rows

    def _row(self, line: str, number: int) -> dict[str, Any] | str:
        """The line as a row, or what is wrong with it."""
        try:
            data = json.loads(line)
        except ValueError as e:
            return f"not valid JSON ({e})."
        if not isinstance(data, dict):
            return "not a JSON object."
        for key in filter(None, (self.config.question, self.config.answer, self.config.reasoning)):
            if key not in data:
                return f"no key {key!r}.{nearest(key, data)}"
            if not isinstance(data[key], str | int | float):
                return f"{key!r} is neither text nor a number."
        full = str(data[self.config.answer])
        answer = extract(full, self.config.format)
        if answer is None:
            return f"no answer of format {self.config.format!r} in {full[-40:]!r}."
        reasoning = str(data[self.config.reasoning]) if self.config.reasoning else None
        if self.config.format == "gsm8k" and reasoning is None:
            reasoning = re.sub(r"<<.*?>>", "", full.rsplit("####", 1)[0]).strip()
        return {"prompt": str(data[self.config.question]), "answer": answer, "reasoning": reasoning, "line": number}


def extract(text: str, form: Format) -> str | None:
    """The answer that a text gives, or None where it gives none."""
    if form == "text":
        return text.strip() or None
    if form == "gsm8k":
        _, mark, tail = text.rpartition("####")
        return extract(tail, "number") if mark else None
    if form == "number":
        numbers = NUMBER.findall(text)
        return numbers[-1].rstrip(",") if numbers else None
    at = text.rfind("\\boxed{")
    if at < 0:
        return None
    depth, start = 1, at + len("\\boxed{")
    for end in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[start:end].strip()
    return None


def same(given: str, reference: str) -> bool:
    """Equal as numbers where both are numbers, else as text without case and spaces around."""
    a, b = as_number(given), as_number(reference)
    if a is not None and b is not None:
        return a == b
    return " ".join(given.casefold().split()) == " ".join(reference.casefold().split())


def as_number(text: str) -> Decimal | None:
    try:
        value = Decimal(re.sub(r"[$,%\s]", "", text))
    except InvalidOperation:
        return None
    return value if value.is_finite() else None


def _shuffled(count: int, lap: int) -> list[int]:
    """The order of one lap over the data; the last one asked for is kept."""
    if _ORDER.get("key") != (count, lap):
        order = list(range(count))
        random.Random(f"{count} {lap}").shuffle(order)
        _ORDER.update(key=(count, lap), order=order)
    return _ORDER["order"]


_ORDER: dict[str, Any] = {}
