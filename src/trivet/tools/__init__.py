"""What a model may do besides writing: tools by name, off unless asked for."""

from __future__ import annotations

import re

from trivet.config import UserError, nearest
from trivet.tools.base import Tool, ToolFailure, ToolResult
from trivet.tools.python import evaluate, open_sandbox

LONGEST_NUMBER = 32


def calculator(expression: str) -> str:
    """Evaluate an arithmetic expression with + - * / // % ** and parentheses, e.g. (2+3)*4."""
    if not re.fullmatch(r"[-+*/%().\d\s]{1,200}", expression):
        raise ToolFailure("error: not arithmetic")
    return evaluate(expression, LONGEST_NUMBER)


def python(code: str) -> str:
    """Run a short Python program in a sandbox; the result is what it prints or its last expression."""
    return evaluate(code)


TOOLS = {function.__name__: function for function in (calculator, python)}


def get_tool(name: str) -> Tool:
    """A built-in tool, ready to run. Raises UserError naming the nearest one, or what it lacks."""
    if name not in TOOLS:
        raise UserError(f"No tool {name!r}; there are {', '.join(TOOLS)}.{nearest(name, TOOLS)}")
    open_sandbox()  # what is missing is said now, not at the first call after minutes of training
    return Tool(TOOLS[name])


__all__ = ["TOOLS", "Tool", "ToolFailure", "ToolResult", "get_tool"]
