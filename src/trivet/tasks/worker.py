"""The other side of `apart`: a process that loads functions by name and calls them, one a line.

    {"load": "module:function"}                              -> {"raised": null, or why not}
    {"call": "module:function", "args": [...], "seconds": s} -> the Score as JSON

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
    functions: dict[str, Callable[..., Score]] = {}
    for line in sys.stdin:
        request = json.loads(line)
        if "load" in request:
            answer = load(request["load"], functions)
        else:
            limit_cpu(request["seconds"])
            answer = call(functions[request["call"]], request["args"])
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def load(name: str, functions: dict[str, Callable[..., Score]]) -> dict[str, Any]:
    """Import it and, where its module has a WARM_UP, call it once: what is slow the first time is not timed."""
    module, _, function = name.partition(":")
    try:
        found = importlib.import_module(module)
        functions[name] = vars(found)[function]
        example = vars(found).get("WARM_UP", {}).get(function)
        if example is not None:
            functions[name](*example)
    except UserError as e:
        return {"raised": str(e)}
    except Exception as e:
        return {"raised": f"The grader {name} can't be loaded: {type(e).__name__}: {e}"}
    return {"raised": None}


def call(function: Callable[..., Score], args: list[Any]) -> dict[str, Any]:
    try:
        score = function(*args)
    except Exception as e:  # not ours to judge; whatever it raises must not become a 0
        score = Score(0.0, "error", detail=f"{type(e).__name__}: {e}"[:1000])
    if not math.isfinite(score.value):
        score = Score(0.0, "error", detail=f"not a finite score: {score.value}")
    return asdict(score)


def limit_cpu(seconds: float) -> None:
    used = resource.getrusage(resource.RUSAGE_SELF)
    soft = math.ceil(used.ru_utime + used.ru_stime + seconds) + GRACE
    resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.getrlimit(resource.RLIMIT_CPU)[1]))


if __name__ == "__main__":
    main()
