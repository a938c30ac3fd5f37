"""Depth as a string: `"(lightning/moe*7 gqa/moe)*10"` names the layers of a model, with repetition and groups."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby


def expand_pattern(pattern: str) -> list[str]:
    """`"(a/b*2 c/d)*2"` -> `["a/b", "a/b", "c/d", "a/b", "a/b", "c/d"]`.

    Raises ValueError with the place where the pattern stops making sense.
    """
    tokens = re.findall(r"\(|\)|\*\s*\d+|[^\s()*]+|\S", pattern)

    def group(at: int, depth: int) -> tuple[list[str], int]:
        names: list[str] = []
        while at < len(tokens) and tokens[at] != ")":
            if tokens[at] == "(":
                unit, at = group(at + 1, depth + 1)
                if at >= len(tokens):
                    raise ValueError(f"pattern {pattern!r}: a '(' is never closed")
                at += 1
            else:
                unit, at = [tokens[at]], at + 1
                if unit[0].count("/") not in (1, 2):
                    raise ValueError(f"pattern {pattern!r}: {unit[0]!r} should read mixer/ffn or mixer/ffn/residual")
            if at < len(tokens) and re.fullmatch(r"\*\s*\d+", tokens[at]):
                unit, at = unit * int(tokens[at][1:]), at + 1
            names += unit
        if depth == 0 and at < len(tokens):
            raise ValueError(f"pattern {pattern!r}: a ')' without its '('")
        return names, at

    names, _ = group(0, 0)
    if not names:
        raise ValueError(f"pattern {pattern!r} names no layer")
    return names


def write_pattern(names: Sequence[str]) -> str:
    """The shortest pattern that `expand_pattern` reads as these names, of one repeated unit of runs."""

    def runs(part: Sequence[str]) -> str:
        groups = [(name, len(list(same))) for name, same in groupby(part)]
        return " ".join(name if n == 1 else f"{name}*{n}" for name, n in groups)

    n = len(names)
    period = next(p for p in range(1, n + 1) if n % p == 0 and list(names) == list(names[:p]) * (n // p))
    return runs(names) if period in (1, n) else f"({runs(names[:period])})*{n // period}"
