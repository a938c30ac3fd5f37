"""Programs against tests: right, wrong, and what only the sandbox can't do."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from trivet.config import UserError
from trivet.messages import Message, Score
from trivet.tasks import Problem, Task, make_task
from trivet.tasks.code import read_tests
from trivet.tools import program
from trivet.tools.program import run_program

SQUARE = ["assert square(3) == 9", "assert square(-2) == 4", "assert square(0) == 0", "assert square(1) == 1"]
STDIN = [{"input": "2\n3 4\n", "output": "7\n"}, {"input": "1\n5", "output": "5"}]


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    path = tmp_path_factory.mktemp("code") / "code.jsonl"
    rows = [
        {"question": f"Square a number ({i}).", "solution": "def square(x):\n    return x * x", "tests": SQUARE}
        for i in range(40)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return make_task({"name": "code", "path": str(path)})


def grade(task: Task, text: str, tests: Any = None) -> Score:
    problem = task.problem("train", 0)
    if tests is not None:
        problem = Problem("p", "?", "", meta={"tests": read_tests(tests)})
    return task.grade(problem, Message("assistant", text))


def block(code: str) -> str:
    return f"Here it is:\n```python\n{code}\n```\n"


def test_worked_examples_pass_their_own_tests(task: Task) -> None:
    for i in range(5):
        problem = task.problem("train", i)
        score = task.grade(problem, task.demonstrate(problem, random.Random(i)).messages[-1])
        assert score == Score(1.0, parts={"tests": 1.0})


@pytest.mark.parametrize(
    ("code", "share"),
    [
        ("def square(x):\n    return x ** 2", 1.0),
        ("def square(x):\n    return x * 3 if x == 3 else 0", 0.5),
        ("def square(x):\n    return 2 * x", 0.25),
        ("def square(x)\n    return x", 0.0),
        ("def cube(x):\n    return x", 0.0),
        ("def square(x):\n    while True:\n        pass", 0.0),
        ("def square(x):\n    return square(x)", 0.0),
        ("def square(x):\n    return undefined", 0.0),
        ("x = input()", 0.0),
        ("import nosuchmodule", 0.0),
    ],
)
def test_the_share_of_tests_that_pass(task: Task, code: str, share: float) -> None:
    score = grade(task, block(code), SQUARE if "while" not in code else SQUARE[:1])
    assert score.ok and score.parts == {"tests": share} and score.value == float(share == 1)


def test_partial_scores(task: Task) -> None:
    partial = type(task)(task.config.model_copy(update={"partial": True}))  # type: ignore[attr-defined]
    assert grade(partial, block("def square(x):\n    return x * 3 if x == 3 else 0"), SQUARE).value == 0.5


@pytest.mark.parametrize(
    "code",
    [
        "import heapq",
        "def square(x):\n    yield x\nsquare(3)",
        "x = 1\ndel x",
        "import sys\nsys.setswitchinterval(1)",
        "@staticmethod\ndef f(): pass",
    ],
)
def test_what_only_the_sandbox_lacks_is_no_verdict(task: Task, code: str) -> None:
    score = grade(task, block(code), SQUARE[:1])
    assert score.status == "error" and "unsupported" in score.detail


def test_a_sandbox_that_is_killed_is_no_verdict(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without limits of its own the worker is killed by the pool's, and replaced."""
    monkeypatch.setattr(program, "LIMITS", {})
    score = grade(task, block("while True:\n    pass"), SQUARE[:1])
    assert score.status == "error" and "crashed" in score.detail
    assert grade(task, block("def square(x):\n    return x * x")).value == 1


@pytest.mark.parametrize(
    "code",
    [
        "n = int(input())\nprint(sum(map(int, input().split())))",
        "import sys\nn = int(sys.stdin.readline())\nprint(sum(int(x) for x in sys.stdin.readline().split()))",
        "import sys\ndata = sys.stdin.read().split()\nprint(sum(map(int, data[1:])))",
        "import sys\nlines = sys.stdin.readlines()\nprint(sum(map(int, lines[1].split())), ' ')",
        "import sys\ntotal = 0\nfor line in sys.stdin:\n    total = sum(map(int, line.split()))\nprint(total)\nprint()",
        "import sys\ninput = sys.stdin.readline\ninput()\nprint(sum(map(int, input().split())))",
    ],
)
def test_programs_that_read_and_print(task: Task, code: str) -> None:
    assert grade(task, block(code), STDIN) == Score(1.0, parts={"tests": 1.0})
    wrong = grade(task, block(code.replace("sum", "max")), STDIN)
    assert wrong.ok and wrong.value == 0 and "not '7" in wrong.detail and wrong.parts["tests"] == 0.5


def test_only_the_last_block_counts(task: Task) -> None:
    right, wrong = block("def square(x):\n    return x * x"), block("def square(x):\n    return 0")
    assert grade(task, wrong + right).value == 1 and grade(task, right + wrong).value == 0
    assert grade(task, "def square(x): return x * x").detail == "no ```python block"
    assert grade(task, "```python\ndef square(x):\n    return x * x").value == 0  # cut before its end


def test_tests_cannot_be_printed_away(task: Task) -> None:
    """Tests run in sessions of their own: what a program leaves behind in one is not there in the next."""
    sneaky = "print('a' * 300_000)\ndef square(x):\n    return x * x"
    assert "too much" in grade(task, block(sneaky)).detail
    assert run_program(["x = 1"]).verdict == "passed" and run_program(["print(x)"]).verdict == "failed"


def test_forms_of_tests() -> None:
    assert read_tests("assert f()") == ("assert f()",) and read_tests('["a", "b"]') == ("a", "b")
    assert read_tests({"inputs": ["1"], "outputs": ["2"]}) == (("1", "2"),) and read_tests(STDIN)[1] == ("1\n5", "5")
    for bad in ([], [1], {"inputs": ["1"], "outputs": []}, "[broken", [{"input": 1, "output": "2"}], None):
        assert isinstance(read_tests(bad), str)


def test_rows_without_tests_are_said(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"question": "q", "solution": "s"}\n')
    with pytest.raises(UserError, match="no key 'tests' of tests"):
        make_task({"name": "code", "path": str(tmp_path / "a.jsonl")})
