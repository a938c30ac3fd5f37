"""Programming problems: the answer's last ```python block is run against the row's tests, in the sandbox.

The key `tests` holds one of these (or JSON text of one):

    ["assert f(1) == 2", ...]                                each run after the program, in a session of its own
    "assert f(1) == 2\\n..."                                  the same as one test
    [{"input": "3\\n", "output": "9\\n"}, ...]                the program reads stdin and prints, compared line by line
    {"inputs": [...], "outputs": [...]}                      without spaces at line ends

Score: 1 if all tests pass, else 0 (`partial`: their share); the share is part "tests". What the sandbox can't run
though Python could (most of the standard library, generators, `del`; see tools/program.py) is an "error", and a
sandbox that dies is one: neither is a 0. Stdin is there as input() and sys.stdin's read, readline, readlines and loop.
Left out: HumanEval's check(candidate), special judges, several files. (pip install 'trivet[tools]')
"""

from __future__ import annotations

import json
import re
from typing import Any, Literal

from pydantic import Field

from trivet.messages import Message, Score
from trivet.tasks.base import Problem
from trivet.tasks.source import Reference, Source, SourceConfig
from trivet.tools.program import Outcome, run_program
from trivet.tools.python import open_sandbox

BLOCK = re.compile(r"```(?:python3?|py)?[ \t]*\n(.*?)```", re.DOTALL)
STDIN = """
_lines = {lines!r}
def input(prompt=""):
    if not _lines:
        raise EOFError("EOF when reading a line")
    return _lines.pop(0)
def _stdin_readline():
    return _lines.pop(0) + "\\n" if _lines else ""
def _stdin_readlines():
    found = [line + "\\n" for line in _lines]
    _lines.clear()
    return found
def _stdin_read():
    return "".join(_stdin_readlines())
"""

Test = str | tuple[str, str]  # code with assertions, or what goes in and what should come out


class CodeConfig(SourceConfig):
    name: Literal["code"] = "code"
    answer: str = Field(default="solution", description="key of a program that is right")
    tests: str = Field(default="tests", description="key of the tests")
    partial: bool = Field(default=False, description="the score is the share of tests that pass")


class Code(Source):
    config: CodeConfig

    def __init__(self, config: CodeConfig) -> None:
        open_sandbox()  # what is missing is said now
        super().__init__(config)

    def reference(self, data: dict[str, Any]) -> Reference | str:
        if self.config.tests not in data:
            return f"no key {self.config.tests!r} of tests."
        tests = read_tests(data[self.config.tests])
        if isinstance(tests, str):
            return tests
        return Reference(str(data[self.config.answer]), meta={"tests": tests})

    def written(self, answer: str) -> str:
        return f"```python\n{answer.strip()}\n```"

    def grade(self, problem: Problem, message: Message) -> Score:
        blocks = BLOCK.findall(message.content)
        if not blocks:
            return Score(0.0, parts={"tests": 0.0}, detail="no ```python block")
        outcomes = [run_test(blocks[-1], test) for test in problem.meta["tests"]]
        lost = next((o for o in outcomes if o.verdict in ("unsupported", "crashed")), None)
        if lost is not None:
            return Score(0.0, "error", detail=f"sandbox: {lost.verdict}: {lost.text[:200]}")
        share = sum(o.verdict == "passed" for o in outcomes) / len(outcomes)
        first = next((o.text for o in outcomes if o.verdict == "failed"), "")
        return Score(share if self.config.partial else float(share == 1), parts={"tests": share}, detail=first[:200])


def read_tests(found: Any) -> tuple[Test, ...] | str:
    """The tests of a row in one form, or what is wrong with them."""
    if isinstance(found, str) and found.lstrip()[:1] in ("[", "{"):
        try:
            found = json.loads(found)
        except ValueError as e:
            return f"the tests are not valid JSON ({e})."
    if isinstance(found, str):
        found = [found]
    if isinstance(found, dict) and {"inputs", "outputs"} <= found.keys():
        if len(found["inputs"]) != len(found["outputs"]):
            return f"{len(found['inputs'])} inputs and {len(found['outputs'])} outputs."
        found = [{"input": i, "output": o} for i, o in zip(found["inputs"], found["outputs"], strict=True)]
    if not isinstance(found, list) or not found:
        return "no tests."
    tests: list[Test] = []
    for test in found:
        if isinstance(test, dict) and isinstance(test.get("input"), str) and isinstance(test.get("output"), str):
            tests.append((test["input"], test["output"]))
        elif isinstance(test, str) and test.strip():
            tests.append(test)
        else:
            return f"a test is neither code nor text for input and output: {str(test)[:80]}."
    return tuple(tests)


def run_test(program: str, test: Test) -> Outcome:
    if isinstance(test, str):
        return run_program((program, test))
    given, wanted = test
    done = run_program((STDIN.format(lines=given.splitlines()), with_stdin(program)))
    if done.verdict != "passed" or lines(done.text) == lines(wanted):
        return done
    return Outcome("failed", f"printed {done.text[:60]!r}, not {wanted[:60]!r}")


def with_stdin(program: str) -> str:
    """sys.stdin, which the sandbox lacks, by the functions of `STDIN`."""
    program = re.sub(r"\b(?:sys\.)?stdin\.(readlines|readline|read)\(\)", r"_stdin_\1()", program)
    program = re.sub(r"\bsys\.stdin\.readline\b(?!\()", "_stdin_readline", program)
    return re.sub(r"\bin (?:sys\.)?stdin\b", "in _stdin_readlines()", program)


def lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]
