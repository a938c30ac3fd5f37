"""Freed memory is kept: touching a large block a second time faults no page in."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

CODE = """
import resource, sys
from trivet.recipes.memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def touch():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    bytearray(64 * 2**20)  # zeroed, so every page is written
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
touch()
print(touch())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be asked")
def test_a_large_block_is_paid_for_once() -> None:
    def faults(how: str) -> int:
        done = subprocess.run([sys.executable, "-c", CODE, how], capture_output=True, text=True, timeout=60)
        return int(done.stdout)

    assert faults("keep") < 100
    assert faults("give back") > 2 * faults("keep") + 20  # the twin; huge pages would make it few faults too
