"""A crash, a kill -9 or a full disk at any moment leaves the old state or the new one."""

from __future__ import annotations

import builtins
import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Self

import pytest

from trivet.config import UserError
from trivet.disk import Journal, atomic_dir, settle_all, write_atomic

WRITER = """
import sys
from pathlib import Path
from trivet.disk import atomic_dir, write_atomic
folder, atomic = Path(sys.argv[1]), sys.argv[2] == "atomic"
i = 0
print("go", flush=True)
while True:
    i += 1
    text = f"{i % 10}" * 300_000
    if atomic:
        write_atomic(folder / "file", text)
        with atomic_dir(folder / "dir") as aside:
            (aside / "a").write_text(text)
            (aside / "b").write_text(text)
    else:
        (folder / "file").write_text(text)
        (folder / "dir").mkdir(exist_ok=True)
        (folder / "dir" / "a").write_text(text)
        (folder / "dir" / "b").write_text(text)
"""


def whole(folder: Path) -> bool:
    """Every file is one digit repeated, and the two files of the folder belong together."""
    file = (folder / "file").read_text()
    a, b = (folder / "dir" / "a").read_text(), (folder / "dir" / "b").read_text()
    return all(len(t) == 300_000 and set(t) == {t[0]} for t in (file, a, b)) and a == b


def kill_in_mid_write(folder: Path, kind: str, delay: float) -> None:
    with subprocess.Popen([sys.executable, "-c", WRITER, str(folder), kind], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None and child.stdout.readline() == b"go\n"
        deadline = time.monotonic() + 10
        while not (folder / "dir" / "b").exists() and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(delay)
        child.send_signal(signal.SIGKILL)


def test_kill_leaves_whole_files(tmp_path: Path) -> None:
    for attempt in range(6):
        kill_in_mid_write(tmp_path, "atomic", 0.003 * attempt)
        settle_all(tmp_path)
        assert whole(tmp_path)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["dir", "file"]


def test_kill_breaks_plain_writing(tmp_path: Path) -> None:
    """The twin: the same kills do tear files that are written in place."""
    torn = 0
    for attempt in range(12):
        kill_in_mid_write(tmp_path, "plain", 0.001 * attempt)
        torn += not whole(tmp_path)
        if torn:
            return
    pytest.fail("no kill hit a write, so the test above proves nothing")


def test_crash_between_the_two_renames(tmp_path: Path) -> None:
    """Only the aside names are left: settle puts the old folder back."""
    final = tmp_path / "state"
    with atomic_dir(final) as aside:
        (aside / "x").write_text("old")
    os.rename(final, tmp_path / ".state.old")
    (tmp_path / ".state.partial").mkdir()
    settle_all(tmp_path)
    assert (final / "x").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["state"]


class FullFile:
    """A file that takes `after` bytes and then fails, as on a full disk."""

    def __init__(self, file: Any, after: int):
        self.file, self.after = file, after

    def write(self, data: bytes) -> int:
        self.file.write(data[: self.after])
        self.file.flush()
        raise OSError(errno.ENOSPC, "No space left on device")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def full_disk(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    real = builtins.open

    def full(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        handle = real(file, mode, *args, **kwargs)
        return FullFile(handle, after) if "w" in mode or "a" in mode else handle

    monkeypatch.setattr(builtins, "open", full)


def test_full_disk_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomic(path, "old")
    with monkeypatch.context() as m:
        full_disk(m, after=2)
        with pytest.raises(UserError) as caught:
            write_atomic(path, "newer")
    text = str(caught.value)
    assert str(path) in text and "No space left" in text and "MB are free" in text and "resumes" in text
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_full_disk_keeps_the_old_folder(tmp_path: Path) -> None:
    final = tmp_path / "dir"
    with atomic_dir(final) as aside:
        (aside / "x").write_text("old")
    with pytest.raises(UserError, match="dir: No space left"), atomic_dir(final) as aside:
        (aside / "x").write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert (final / "x").read_text() == "old"
    assert list(tmp_path.iterdir()) == [final]


def test_an_error_of_the_block_is_not_blamed_on_the_disk(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), atomic_dir(tmp_path / "dir"):
        _ = 1 / 0
    assert list(tmp_path.iterdir()) == []


def test_full_disk_leaves_no_half_journal_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(tmp_path / "metrics.jsonl")
    journal.append(1, loss=2.5)
    before = journal.path.read_bytes()
    with monkeypatch.context() as m:
        full_disk(m, after=5)
        with pytest.raises(UserError, match=r"metrics\.jsonl: No space left"):
            journal.append(2, loss=2.25)
    assert journal.path.read_bytes() == before
    journal.append(2, loss=2.25)
    assert journal.read() == [{"step": 1, "loss": 2.5}, {"step": 2, "loss": 2.25}]


def test_journal_forgets_what_came_after_a_step(tmp_path: Path) -> None:
    """Resumed at step 3 after a kill in the middle of step 5's line: as if never interrupted."""
    straight, resumed = Journal(tmp_path / "a"), Journal(tmp_path / "b")
    for step in range(1, 7):
        straight.append(step, loss=1 / step, note="é")
    for step in range(1, 5):
        resumed.append(step, loss=1 / step, note="é")
    with resumed.path.open("a") as file:
        file.write('{"step": 5, "lo')
    resumed.truncate_after(3)
    for step in range(4, 7):
        resumed.append(step, loss=1 / step, note="é")
    assert resumed.path.read_bytes() == straight.path.read_bytes()


def test_journal_refuses_what_json_cannot_say(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "a")
    with pytest.raises(ValueError, match="not JSON compliant"):
        journal.append(1, loss=float("nan"))
    assert journal.read() == []
    journal.append(1, loss=0.1)
    assert json.loads(journal.path.read_text())["loss"] == 0.1
