"""Programs that do a list of jobs with several processes each, and what their runs logged."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from trivet.disk import Journal


def run_jobs(program: str, jobs: Sequence[Any], folder: Path) -> Path:
    """`folder` with what the program beside this file made of the jobs."""
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", str(Path(__file__).with_name(program)), str(folder), json.dumps(jobs)],
        check=False, capture_output=True, text=True, timeout=200, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def logged(folder: Path, times: Collection[str]) -> list[dict[str, Any]]:
    """A run's metrics without those that differ from run to run."""
    return [{k: v for k, v in line.items() if k not in times} for line in Journal(folder / "metrics.jsonl").read()]
