"""Code that a model wrote, run in pydantic-monty: a Python subset in a worker process of its own.

It has no files, network, environment or imports that reach the host; memory, time and the length of
what comes back are limited, and a worker that does not answer is killed and replaced. One worker is
kept warm, each call gets a fresh session (about 0.1 ms). Not a full Python: no classes with
inheritance, no generators, few modules. (pip install 'trivet[tools]')
"""

from __future__ import annotations

import atexit
import re
from typing import Any

from trivet.config import UserError
from trivet.tools.base import ToolFailure

LIMITS = {"max_feed_duration_secs": 0.5, "max_memory": 16_000_000, "max_recursion_depth": 100}
REQUEST_SECONDS = 2.0  # the worker is killed if even its own limits did not stop it
MAX_CHARS = 1000

_pool: Any = None


def evaluate(code: str, max_chars: int = MAX_CHARS) -> str:
    """The value of the last expression, or what was printed. Raises ToolFailure with text for the model."""
    pool = open_sandbox()
    import pydantic_monty as monty

    printed: list[str] = []
    try:
        with pool.checkout(limits=LIMITS) as session:
            value = session.feed_run(code, print_callback=lambda stream, text: printed.append(text))
    except monty.MontyCrashedError as e:
        raise ToolFailure("error: time limit" if e.timed_out else "error: out of resources", "timeout") from None
    except monty.MontySyntaxError:
        raise ToolFailure("error: syntax") from None
    except monty.MontyError as e:
        kind = re.match(r"\w+", str(e))
        name = kind[0] if kind else "error"
        status = {"TimeoutError": "timeout", "MemoryError": "limit", "RecursionError": "limit"}.get(name, "error")
        raise ToolFailure(f"error: {name}", status) from None  # type: ignore[arg-type]
    text = "".join(printed) + ("" if value is None else str(value))
    if len(text) > max_chars:
        raise ToolFailure("error: too long", "limit")
    return text


def open_sandbox() -> Any:
    """The worker, started if it is not running. Raises UserError where it can't be."""
    global _pool
    if _pool is None:
        try:
            import pydantic_monty as monty
        except ImportError:
            raise UserError("Running a model's code needs pydantic-monty: pip install 'trivet[tools]'") from None
        try:
            _pool = monty.Monty(max_processes=1, request_timeout=REQUEST_SECONDS).__enter__()
        except OSError as e:  # its program is missing or may not be run
            raise UserError(f"pydantic-monty, which runs a model's code, does not start: {e}") from None
        atexit.register(_pool.__exit__, None, None, None)
    return _pool
