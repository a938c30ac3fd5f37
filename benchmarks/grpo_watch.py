"""What both sides of grpo.py measure alike: clocks around steps, and memory. Imports nothing that either would not."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Watch:
    """Wall and CPU seconds of steps, and what of them generation took; and when to stop."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.job, self.steps = job, []
        self.generating = [0.0, 0.0]
        self.began = self.mark = self.clocks()

    @staticmethod
    def clocks() -> list[float]:
        return [time.perf_counter(), time.process_time()]

    def around(self, generate: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            start = self.clocks()
            result = generate(*args)
            self.generating = [a - b for a, b in zip(self.clocks(), start, strict=True)]
            return result

        return timed

    def start(self) -> None:
        self.began = self.mark = self.clocks()

    def step(self, reward: float, tokens: int, trained: float = 1.0) -> bool:
        """Note a step that has ended, and the share of its answers that was trained on; whether the job is done."""
        now = self.clocks()
        wall, cpu = (a - b for a, b in zip(now, self.mark, strict=True))
        generating, generating_cpu = self.generating
        self.steps.append({
            "seconds": wall, "cpu": cpu, "generating": generating, "generating_cpu": generating_cpu,
            "reward": reward, "tokens": tokens, "trained": trained,
        })  # fmt: skip
        self.mark = now
        spent = [a - b for a, b in zip(now, self.began, strict=True)][self.job["cpu_time"]]
        enough = self.job["seconds"] is not None and spent >= self.job["seconds"]
        return enough or len(self.steps) == self.job["steps"]


def memory(which: str) -> int:
    """Bytes of this process, VmHWM (most so far) or VmRSS (now). getrusage's peak would begin with the parent's."""
    return 1024 * int(Path("/proc/self/status").read_text().split(which + ":")[1].split()[0])
