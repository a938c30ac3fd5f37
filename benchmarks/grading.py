"""Gradings a minute by the worker processes of `tasks/apart.py`, from one and from several threads.

python benchmarks/grading.py
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

from trivet.tasks.apart import WORKERS, pool
from trivet.tasks.symbolic import grade_math

ANSWERS = [  # every number differs, because math-verify remembers what it parsed
    ("\\frac{{{n}}}{{2}}", "so the answer is $\\boxed{{\\frac{{{n}}}{{2}}}}$"),
    ("x^2+{n}x+1", "\\boxed{{x(x+{n})+1}}"),
    ("{n}\\sqrt{{2}}", "\\boxed{{\\sqrt{{2}} \\cdot {n}}}"),
    ("{n}", "First 3 and then 7, which makes \\boxed{{{n}}}."),
    ("(1,{n})", "\\boxed{{({n},1)}}"),
]
COUNT = 1000


def one(i: int) -> float:
    reference, text = ANSWERS[i % len(ANSWERS)]
    return grade_math(reference.format(n=2 * i + 3), text.format(n=2 * i + 3)).value


def measure(threads: int, count: int = COUNT) -> float:
    with ThreadPoolExecutor(threads) as executor:
        list(executor.map(one, range(4 * threads)))  # start the workers
        began = time.perf_counter()
        values = list(executor.map(one, range(count)))
    assert sum(values) == 0.8 * count
    return 60 * count / (time.perf_counter() - began)


def main() -> None:
    for threads in sorted({1, WORKERS}):
        print(f"{threads} threads, {WORKERS} workers at most: {measure(threads):,.0f} gradings a minute")
    began = time.perf_counter()
    status = grade_math("1", "$9^{9^9}$").status
    print(f"9^9^9: {status} after {time.perf_counter() - began:.2f} s; {dict(pool().counts)}")


if __name__ == "__main__":
    main()
