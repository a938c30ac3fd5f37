"""The other side of `apart`: a process that loads functions by name and calls them, one a line.

    {"load": "module:function"}                              -> {"raised": null, or why not}
    {"load": "module:maker [1, 2]"}                          -> the same: maker(1, 2) gives the function
    {"call": what was loaded, "args": [...], "seconds": s}   -> {"score": the Score} or {"value": any other JSON}

Whatever a library prints must not mix with the answers, so they have a file descriptor of their own.
The parent keeps the time; should it be gone, the limit on CPU time ends a worker that hangs.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import resource
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from trivet.config import UserError
from trivet.messages import Score

MEMORY = 4 << 30  # bytes of address space: a number with a billion digits is a MemoryError, not a full machine
GRACE = 10  # seconds of CPU time over the limit of a call


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    functions: dict[str, Callable[..., Any]] = {}
    for line in sys.stdin:
        request = json.loads(line)
        if "load" in request:
            answer = load(request["load"], functions)
        else:
            limit_cpu(request["seconds"])
            answer = call(functions[request["call"]], request["args"])
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def load(name: str, functions: dict[str, Callable[..., Any]]) -> dict[str, Any]:
    """Import it and, where its module has a WARM_UP, call it once: what is slow the first time is not timed."""
    where, _, given = name.partition(" ")
    module, _, function = where.partition(":")
    try:
        found = importlib.import_module(module)
        functions[name] = vars(found)[function](*json.loads(given)) if given else vars(found)[function]
        example = vars(found).get("WARM_UP", {}).get(function)
        if example is not None:
            functions[name](*example)
    except UserError as e:
        return {"raised": str(e)}
    except Exception as e:
        return {"raised": f"The grader {name} can't be loaded: {type(e).__name__}: {e}"}
    return {"raised": None}


def call(function: Callable[..., Any], args: list[Any]) -> dict[str, Any]:
    try:
        given = function(*args)
        if not isinstance(given, Score):
            json.dumps(given)
            return {"value": given}
    except Exception as e:  # not ours to judge; whatever it raises must not become a 0
        given = Score(0.0, "error", detail=f"{type(e).__name__}: {e}"[:1000])
    if not math.isfinite(given.value):
        given = Score(0.0, "error", detail=f"not a finite score: {given.value}")
    return {"score": asdict(given)}


def limit_cpu(seconds: float) -> None:
    used = resource.getrusage(resource.RUSAGE_SELF)
    soft = math.ceil(used.ru_utime + used.ru_stime + seconds) + GRACE
    resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.getrlimit(resource.RLIMIT_CPU)[1]))


if __name__ == "__main__":
    main()
