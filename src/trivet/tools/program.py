"""A program that a model wrote, run once in the sandbox, and whose fault it is where it does not end well.

    passed        it ran to its end; `text` is what it printed
    failed        its own fault: wrong syntax, an exception, an assertion, more time or memory than it is given
    unsupported   the sandbox can't run it, Python could: a module, builtin or statement that pydantic-monty lacks
    crashed       the sandbox itself died or was killed

The last two say nothing about the program, so they are no verdict. (pip install 'trivet[tools]')
"""

from __future__ import annotations

import builtins
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from trivet.tools.python import open_sandbox

LIMITS = {"max_feed_duration_secs": 1.5, "max_memory": 128_000_000, "max_recursion_depth": 900}
MAX_PRINTED = 200_000  # characters

Verdict = Literal["passed", "failed", "unsupported", "crashed"]
NO_CONSOLE = {"input", "open", "exit", "quit", "breakpoint"}  # builtins that a program under test has no use for


@dataclass(frozen=True)
class Outcome:
    verdict: Verdict
    text: str = ""


def run_program(pieces: Sequence[str]) -> Outcome:
    """Run pieces of code one after the other in one fresh session. Raises UserError without a sandbox."""
    pool = open_sandbox()
    import pydantic_monty as monty

    printed: list[str] = []
    size = 0

    def collect(stream: str, text: str) -> None:
        nonlocal size
        size += len(text)
        if size > MAX_PRINTED:
            raise OverflowError("printed too much")
        printed.append(text)

    try:
        with pool.checkout(limits=LIMITS) as session:
            for piece in pieces:
                session.feed_run(piece, print_callback=collect)
    except monty.MontyCrashedError as e:
        return Outcome("crashed", str(e))
    except monty.MontySyntaxError as e:
        return Outcome("failed", f"SyntaxError: {e}")
    except monty.MontyError as e:
        return Outcome("unsupported" if lacks(str(e)) else "failed", str(e))
    return Outcome("passed", "".join(printed))


def lacks(error: str) -> bool:
    """Whether an error is the sandbox's and would not be Python's."""
    if error.startswith("NotImplementedError: The monty"):
        return True
    if found := re.match(r"ModuleNotFoundError: No module named '(\w+)", error):
        return found[1] in sys.stdlib_module_names
    if found := re.match(r"(?:AttributeError: module|ImportError: cannot import name '\w+' from) '(\w+)'", error):
        return found[1] in sys.stdlib_module_names
    if found := re.match(r"NameError: name '(\w+)' is not defined", error):
        return found[1] in vars(builtins) and found[1] not in NO_CONSOLE
    return False
