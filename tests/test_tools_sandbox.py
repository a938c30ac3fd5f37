"""Tools: the schema of a function, and code that tries to do harm."""

from __future__ import annotations

import importlib
import sys
import time
from typing import Any

import pytest

from trivet.config import UserError
from trivet.tools import Tool, get_tool

CALCULATOR, PYTHON = get_tool("calculator"), get_tool("python")


def test_the_schema_comes_from_the_function() -> None:
    def add(a: int, b: int = 2) -> str:
        """Add two numbers."""
        return str(a + b)

    tool = Tool(add)
    assert tool.spec.name == "add" and tool.spec.description == "Add two numbers."
    assert tool.spec.parameters["properties"]["a"]["type"] == "integer" and tool.spec.parameters["required"] == ["a"]
    assert tool.run({"a": 1}).text == "3"
    assert tool.run({"a": "x"}).status == "error" and "a" in tool.run({"a": "x"}).text
    assert tool.run({"a": 1, "c": 1}).status == "error"


@pytest.mark.parametrize(
    ("expression", "value"), [("74+20", "94"), ("94*3", "282"), ("(2+3)*4", "20"), ("7-10", "-3"), ("2**10", "1024")]
)
def test_calculator(expression: str, value: str) -> None:
    result = CALCULATOR.run({"expression": expression})
    assert result.text == value and result.status == "ok"


@pytest.mark.parametrize(
    "expression", ["1/0", "7**7**10", "9**9**9**9", "2**999", "(", "", "abc", "__import__('os')", "1 2"]
)
def test_calculator_answers_nonsense_with_text(expression: str) -> None:
    began = time.perf_counter()
    result = CALCULATOR.run({"expression": expression})
    assert result.status != "ok" and result.text.startswith("error") and len(result.text) <= 32
    assert time.perf_counter() - began < 4


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("while True: pass", "timeout"),
        ("x = [0]\nwhile True: x = x + x", "limit"),
        ("def f(): return f()\nf()", "limit"),
        ("open('/etc/passwd').read()", "error"),
        ("import os\nos.system('ls')", "error"),
        ("import subprocess", "error"),
        ("import socket", "error"),
        ("print('a' * 5000)", "limit"),
        ("x = ", "error"),
    ],
)
def test_harm_is_refused(code: str, status: str) -> None:
    assert PYTHON.run({"code": code}).status == status


def test_after_harm_it_still_works_and_remembers_nothing() -> None:
    PYTHON.run({"code": "secret = 7"})
    PYTHON.run({"code": "while True: pass"})
    assert PYTHON.run({"code": "print(1 + 1)"}).text == "2\n"
    assert PYTHON.run({"code": "secret"}).status == "error"


def test_unknown_tools_name_the_nearest() -> None:
    with pytest.raises(UserError, match="Did you mean 'calculator'"):
        get_tool("calculater")


def test_a_tool_that_cannot_run_says_so_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not at its first call, which in a run comes after minutes of training."""
    sandbox = importlib.import_module("trivet.tools.python")  # the name in the package is the tool
    monkeypatch.setattr(sandbox, "_pool", None)

    def lost(**_: Any) -> None:
        raise FileNotFoundError("no binary")

    with monkeypatch.context() as patch:
        patch.setattr("pydantic_monty.Monty", lost)
        with pytest.raises(UserError, match="does not start: no binary"):
            get_tool("calculator")
    monkeypatch.setitem(sys.modules, "pydantic_monty", None)
    with pytest.raises(UserError, match=r"pip install 'trivet\[tools\]'"):
        get_tool("calculator")
