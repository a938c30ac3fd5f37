"""Answers compared in symbols by math-verify, called in a worker process only (`apart`).

Its time-outs are switched off: they are SIGALRM, and the parent's clock ends what hangs.
Scores: 1 equal, 0 different or no answer found. "unparsed": the reference itself can't be read.
(pip install 'trivet[tasks]')
"""

from __future__ import annotations

import logging
from importlib.util import find_spec

from trivet.config import UserError
from trivet.messages import Score
from trivet.tasks.apart import grade_apart


def require() -> None:
    """Said when a task is made, not when the first answer is graded."""
    if find_spec("math_verify") is None:
        raise UserError("format = 'math' needs math-verify: pip install 'trivet[tasks]'")


def grade_math(reference: str, text: str) -> Score:
    """Is the answer that `text` gives equal to `reference`, as mathematics?"""
    return grade_apart("trivet.tasks.symbolic:same_math", reference, text)


def same_math(reference: str, text: str) -> Score:
    """The comparison itself; may run for ever."""
    from math_verify import parse, verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that nobody keeps the time
    gold = parse(f"\\boxed{{{reference}}}", parsing_timeout=None, raise_on_error=True)
    if not gold:
        return Score(0.0, "unparsed", detail=f"reference {reference!r}")
    given = parse(text, parsing_timeout=None)
    return Score(float(bool(given) and verify(gold, given, timeout_seconds=None, raise_on_error=True)))


WARM_UP = {"same_math": ("\\frac{1}{2}", "so it is \\boxed{0.5} or 1/2")}
