"""Your own questions and answers: rows of {"question": ..., "answer": ...}.

How the reference answer is found in the `answer` field, and the model's answer in its text:

    text     the whole field; graded by equality without case and outer white space
    number   what is boxed, else declared ("Answer: ..."), else the last number; graded by value (`extract`)
    aime     as number, but whole and from 0 to 999
    boxed    the last \\boxed{...}; graded as numbers where both are, else as text
    gsm8k    the number after `####`; what stands before it is the reasoning, <<...>> marks removed
    math     as boxed, graded by math-verify in symbols (pip install 'trivet[tasks]')
    choice   a letter. `options` names the key of the list of options, and `answer` gives the right one as its letter,
             its index from 0 or its text; or `options` names the keys of the wrong ones, and `answer` the right one's
             text (GPQA). They are shown as A) ... B) ... in an order that a hash of the question decides.

A reference without \\boxed is taken whole where it is one short line (MATH-500's answers).
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from trivet.config import nearest
from trivet.messages import Message, Score
from trivet.tasks import symbolic
from trivet.tasks.base import Problem, Split
from trivet.tasks.extract import LETTERS, Format, choice, extract, same
from trivet.tasks.source import Reference, Source, SourceConfig
from trivet.tasks.tables import Row, read_rows, split_files

SHORT = 80  # characters of a reference that is taken whole


class RowsConfig(SourceConfig):
    format: Format = Field(default="text", description="how answers are written and compared")
    options: str | tuple[str, ...] | None = Field(
        default=None, description="choice: key of the options' list, or the keys of the wrong ones"
    )

    @model_validator(mode="after")
    def _options(self) -> RowsConfig:
        if (self.format == "choice") != (self.options is not None):
            raise ValueError("format = 'choice' and `options` come together")
        return self


class JsonlConfig(RowsConfig):
    name: Literal["jsonl"] = "jsonl"


class DatasetConfig(RowsConfig):
    """A data set's directory as the hub stores it; `path` is the directory."""

    name: Literal["dataset"] = "dataset"
    split: str = Field(default="train", description="the split to learn from")
    test_split: str | None = Field(default="test", description="the held-out one; '' takes a share of `split`")


class Jsonl(Source):
    """One file, by its suffix: JSONL, JSON, CSV or Parquet."""

    config: RowsConfig

    def __init__(self, config: RowsConfig) -> None:
        if config.format == "math":
            symbolic.require()
        super().__init__(config)

    def grade(self, problem: Problem, message: Message) -> Score:
        form = self.config.format
        if form == "math":
            return symbolic.grade_math(problem.answer, message.content)
        if form == "choice":
            given = choice(message.content, problem.meta["options"])
        else:
            given = extract(message.content, "number" if form == "gsm8k" else form)
        if given is None:
            return Score(0.0, detail="no answer found in the text")
        return Score(float(same(given, problem.answer)))

    def written(self, answer: str) -> str:
        box = f"\\boxed{{{answer}}}"
        return {"boxed": box, "math": box, "choice": f"Answer: {answer}"}.get(self.config.format, answer)

    def reference(self, data: dict[str, Any]) -> Reference | str:
        form, full = self.config.format, str(data[self.config.answer])
        if form == "choice":
            return self._options(data)
        found = reference(full, form)
        if found is None:
            return f"no answer of format {form!r} in {full[-40:]!r}."
        before = re.sub(r"<<.*?>>", "", full.rsplit("####", 1)[0]).strip() if form == "gsm8k" else None
        return Reference(found, reasoning=before)

    def _options(self, data: dict[str, Any]) -> Reference | str:
        """The options in the order in which they are shown, and the right one's letter; or what is wrong."""
        keys, answer, question = self.config.options, data[self.config.answer], data[self.config.question]
        if isinstance(keys, tuple):
            missing = next((key for key in keys if key not in data), None)
            if missing is not None:
                return f"no key {missing!r}.{nearest(missing, data)}"
            texts, right = [str(answer), *(str(data[key]) for key in keys)], 0
        else:
            listed = data.get(keys or "")
            labels = listed.get("label") if isinstance(listed, dict) else None  # as ARC has it
            listed = listed.get("text") if isinstance(listed, dict) else listed
            if not isinstance(listed, list | tuple):
                return f"{keys!r} is no list of options.{nearest(keys or '', data)}"
            texts = [str(text) for text in listed]
            found = place_of(answer, texts, labels)
            if found is None:
                return f"the answer {answer!r} is none of the {len(texts)} options."
            right = found
        if not 2 <= len(texts) <= len(LETTERS) or len(set(texts)) < len(texts):
            return f"{len(texts)} options, of which {len(set(texts))} differ; 2 to {len(LETTERS)} different ones can be shown."
        order = sorted(range(len(texts)), key=lambda i: hashlib.blake2s(f"{question}\n{texts[i]}".encode()).digest())
        options = tuple(texts[i] for i in order)
        shown = "\n".join(f"{letter}) {text}" for letter, text in zip(LETTERS, options, strict=False))
        return Reference(LETTERS[order.index(right)], shown, meta={"options": options})


class Dataset(Jsonl):
    """A directory with the files of several splits."""

    config: DatasetConfig

    def read(self, path: str, split: Split) -> list[Row]:
        name = self.config.split if split == "train" else self.config.test_split or ""
        return [row for file in split_files(Path(path), name) for row in read_rows(file)]

    def held_out(self) -> list[Row] | None:
        c = self.config
        return self.read(c.test_path or c.path, "test") if c.test_split or c.test_path else None


def reference(full: str, form: Format) -> str | None:
    """The reference answer in its field; a short line without \\boxed is all answer."""
    found = extract(full, form)
    if found is None and form in ("boxed", "math") and len(full.strip()) <= SHORT and "\n" not in full.strip():
        return full.strip() or None
    return found


def place_of(answer: Any, texts: list[str], labels: Any) -> int | None:
    """Which option an answer names: a label or letter, an index from 0, or the option's text."""
    if isinstance(labels, list) and answer in labels:
        return labels.index(answer)
    given = str(answer).strip()
    if given in texts:
        return texts.index(given)
    if len(given) == 1 and given.upper() in LETTERS[: len(texts)]:
        return LETTERS.index(given.upper())
    return int(given) if given.isdecimal() and int(given) < len(texts) else None
