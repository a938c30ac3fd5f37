"""Reading answers: a labelled set of phrasings, and rows of every kind of file."""

from __future__ import annotations

import csv
import json
import random
import re
from pathlib import Path
from typing import Any

import pytest

from answer_variants import OPTIONS, variants
from trivet.config import UserError
from trivet.messages import Message
from trivet.tasks import make_task
from trivet.tasks.extract import NUMBER, as_number, choice, extract, same
from trivet.tasks.symbolic import grade_math


def agrees(form: Any, reference: str, text: str) -> bool:
    if form == "math":
        return grade_math(reference, text).value == 1.0
    given = choice(text, OPTIONS) if form == "choice" else extract(text, form)
    return given is not None and same(given, reference)


def test_the_labelled_set_is_read_as_labelled() -> None:
    rows = list(variants())
    wrong = [row for row in rows if agrees(*row[:3]) != row[3]]
    assert len(rows) > 400 and {row[0] for row in rows} == {"number", "aime", "boxed", "gsm8k", "choice", "math"}
    assert sum(not row[3] for row in rows) > 60  # or a grader that says yes to all would do well
    assert len(wrong) <= 0.01 * len(rows), "\n".join(map(str, wrong))


def test_the_labelled_set_tells_a_careless_reader() -> None:
    """The twin: the last number, or the last capital letter, is not enough."""

    def careless(form: str, text: str) -> str | None:
        found = re.findall(r"[A-D]", text) if form == "choice" else NUMBER.findall(text)
        return found[-1] if found else None

    rows = [row for row in variants() if row[0] in ("number", "choice")]
    wrong = [r for r in rows if ((g := careless(r[0], r[2])) is not None and same(g, r[1])) != r[3]]
    assert len(wrong) > 0.05 * len(rows)


def test_values() -> None:
    for text, value in (
        ("$1,234.50", 1234.5),
        ("\\frac{3}{4}", 0.75),
        ("-\\dfrac{1}{2}", -0.5),
        ("5e3", 5000),
        ("90^\\circ", 90),
    ):
        assert float(as_number(text) or 0) == value
    for text in ("", "x", "1/0", "1e99999", "3 apples and 4", "\\frac{a}{b}", "--5", "nan", "inf"):
        assert as_number(text) is None


# ------------------------------------------------------------------------------------------------ rows
def task(path: Path, **settings: Any) -> Any:
    return make_task({"name": "jsonl", "path": str(path), **settings})


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


CHOICES = [
    {"q": f"Which is {i}?", "list": [f"{i + k}" for k in (1, 0, 2, 3)], "letter": "B", "index": 1, "text": f"{i}",
     "w1": f"{i + 1}", "w2": f"{i + 2}", "arc": {"text": [f"{i}", f"{i + 1}"], "label": ["1", "2"]}, "key": "1"}
    for i in range(64)
]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "answer"),
    [("list", "letter"), ("list", "index"), ("list", "text"), (("w1", "w2"), "text"), ("arc", "key")],
)
def test_options_are_shuffled_and_the_letter_follows(tmp_path: Path, options: Any, answer: str) -> None:
    path = write(tmp_path / "c.jsonl", CHOICES)
    mine = task(path, format="choice", question="q", options=options, answer=answer, instruction="Give the letter.")
    letters = set()
    for i in range(40):
        problem = mine.problem("train", i)
        wanted = problem.prompt.split()[2].rstrip("?")
        shown = dict(line.split(") ") for line in problem.prompt.splitlines() if ") " in line)
        assert shown[problem.answer] == wanted and problem.prompt.endswith("\n\nGive the letter.")
        assert mine.grade(problem, Message("assistant", f"The answer is ({problem.answer}).")).value == 1.0
        other = next(letter for letter in shown if letter != problem.answer)
        assert mine.grade(problem, Message("assistant", f"\\boxed{{{other}}}")).value == 0.0
        assert mine.grade(problem, mine.demonstrate(problem, random.Random(i)).messages[-1]).value == 1.0
        letters.add(problem.answer)
    assert len(letters) == len(shown)  # no place is preferred
    assert (
        task(path, format="choice", question="q", options=options, answer=answer).problem("train", 3).answer
        == mine.problem("train", 3).answer
    )


def test_wrong_options_are_said(tmp_path: Path) -> None:
    path = write(tmp_path / "c.jsonl", [{"q": "x", "list": ["a", "a"], "letter": "A", "far": 7, "one": ["a", "b"]}])
    for options, answer, message in (
        ("lst", "letter", "'lst' is no list of options. Did you mean 'list'"),
        ("list", "letter", "2 options, of which 1 differ"),
        ("one", "far", "the answer 7 is none of the 2 options"),
        (("w",), "letter", "no key 'w'"),
    ):
        with pytest.raises(UserError, match=message):
            task(path, format="choice", question="q", options=options, answer=answer)
    with pytest.raises(UserError, match="come together"):
        task(path, format="choice", question="q", answer="letter")


def test_references_with_and_without_a_box(tmp_path: Path) -> None:
    rows = [
        {"question": f"q{i}", "answer": "\\frac{1}{2}" if i % 2 else "So\nit is \\boxed{\\frac{1}{2}}."}
        for i in range(64)
    ]
    mine = task(write(tmp_path / "m.jsonl", rows), format="math")
    assert {mine.problem("train", i).answer for i in range(20)} == {"\\frac{1}{2}"}
    assert mine.grade(mine.problem("train", 0), Message("assistant", "so $\\boxed{0.5}$")).value == 1.0
    long = [{"question": "q", "answer": "A long solution.\nIts box is missing."}]
    with pytest.raises(UserError, match="no answer of format 'math'"):
        task(write(tmp_path / "l.jsonl", long), format="math")


def as_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def as_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


ROWS = [{"problem": f"What, exactly, is {i}\nand {i}?", "solution": f"{2 * i}"} for i in range(160)]
WRITERS = {
    "csv": as_csv, "parquet": as_parquet, "jsonl": write, "json": lambda path, rows: path.write_text(json.dumps(rows)),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRITERS)
def test_a_data_sets_directory(tmp_path: Path, kind: str) -> None:
    (tmp_path / "data").mkdir()
    for k in range(2):
        WRITERS[kind](tmp_path / "data" / f"train-0000{k}-of-00002.{kind}", ROWS[64 * k : 64 * k + 64])
    WRITERS[kind](tmp_path / "data" / f"test-00000-of-00001.{kind}", ROWS[128:])
    (tmp_path / "README.md").write_text("train")
    settings = {
        "name": "dataset",
        "path": str(tmp_path),
        "question": "problem",
        "answer": "solution",
        "format": "number",
    }
    mine = make_task(settings)
    train, test = ([mine.problem(s, i) for i in range(n)] for s, n in (("train", 128), ("test", 32)))
    assert {p.prompt for p in train} == {r["problem"] for r in ROWS[:128]} and [p.prompt for p in test] == [
        r["problem"] for r in ROWS[128:]
    ]
    assert {(p.prompt, p.answer) for p in train} == {(r["problem"], r["solution"]) for r in ROWS[:128]}
    shared = make_task(settings | {"test_split": ""})  # a share of train instead
    assert 0 < len({shared.problem("test", i).prompt for i in range(64)} & {r["problem"] for r in ROWS[:128]}) < 64
    with pytest.raises(UserError, match="no files of a split 'validation'; it holds data"):
        make_task(settings | {"split": "validation"})


def test_two_configurations_are_not_mixed(tmp_path: Path) -> None:
    for name in ("main", "socratic"):
        (tmp_path / name).mkdir()
        for split in ("train", "test"):
            write(tmp_path / name / f"{split}.jsonl", [{"question": f"q{i}", "answer": i} for i in range(9)])
    with pytest.raises(UserError, match="give one of them as path"):
        make_task({"name": "dataset", "path": str(tmp_path)})
    assert make_task({"name": "dataset", "path": str(tmp_path / "main")}).problem("test", 8).answer == "8"


def test_broken_files_are_said(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"nothing of the kind")
    (tmp_path / "a.json").write_text("{}")
    (tmp_path / "a.csv").write_text("question,answer\n1,2\n3\n")
    for name, message in (
        ("a.parquet", "can't be read as Parquet"),
        ("a.json", "a list of objects"),
        ("a.csv", "row 1: not as many"),
    ):
        with pytest.raises(UserError, match=message):
            task(tmp_path / name)
