"""Writing to disk so that a crash at any moment leaves the old state or the new one, never a mix.

A file or folder is written aside under a hidden name, flushed to the disk (fsync), and renamed
into place; a rename is atomic on POSIX. A folder that replaces another needs two renames, so a
crash between them can leave only the aside names: `settle` puts the old one back.

Several processes may fill one folder (`partial`), if one of them opens and closes it. Left out: several runs
in one folder.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from trivet.config import UserError


def write_atomic(path: Path, data: bytes | str) -> None:
    """Replace the file at `path` as a whole. A failure leaves the file that was there."""
    aside = _aside(path, "partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(aside, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
        _sync(path.parent)
    except OSError as e:
        raise disk_error(e, path) from e
    finally:
        with suppress(OSError):
            aside.unlink(missing_ok=True)  # there only if something went wrong, Ctrl-C included


@contextmanager
def atomic_dir(final: Path) -> Iterator[Path]:
    """Fill the folder that is handed out; it becomes `final` when the block ends without error."""
    aside, old = partial(final), _aside(final, "old")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        settle(final)
        aside.mkdir()
        yield aside
        for entry in sorted(aside.rglob("*"), reverse=True):  # files before the folder they are in
            _sync(entry)
        _sync(aside)
        if final.exists():
            os.rename(final, old)
        os.rename(aside, final)
        _sync(final.parent)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as e:
        raise disk_error(e, final) from e
    finally:
        if aside.exists() or old.exists():
            with suppress(OSError):
                settle(final)


def partial(final: Path) -> Path:
    """The folder that `atomic_dir(final)` hands out, for other processes that put files into it."""
    return _aside(final, "partial")


def settle(final: Path) -> None:
    """Clean up after a crashed `atomic_dir(final)`: afterwards `final` is whole, or was never there."""
    aside, old = _aside(final, "partial"), _aside(final, "old")
    if old.exists() and not final.exists():
        os.rename(old, final)
    for leftover in (aside, old):
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink(missing_ok=True)


def settle_all(folder: Path) -> None:
    """`settle` for everything in `folder` that a crash may have left half-written."""
    for what in ("partial", "old"):
        for leftover in folder.glob(f".*.{what}"):
            settle(folder / leftover.name.removeprefix(".").removesuffix(f".{what}"))


def disk_error(error: OSError, path: Path) -> UserError:
    """What a person needs to know when a write failed."""
    reason = error.strerror or str(error)
    at = next(p for p in (path, *path.absolute().parents) if p.exists())
    try:
        free = f"{shutil.disk_usage(at).free / 1e6:,.0f} MB are free on that disk"
    except OSError:
        free = "how much is free on that disk could not be found out"
    return UserError(
        f"Could not write {path}: {reason}; {free}. What was there before is untouched: "
        "mend that and run the same command again, it resumes."
    )


class Journal:
    """Metrics as JSON lines, one `{"step": ..., ...}` a line, in the order they were written."""

    def __init__(self, path: Path):
        self.path = path

    def append(self, step: int, **values: Any) -> None:
        line = json.dumps({"step": step, **values}, allow_nan=False) + "\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab", buffering=0) as file:
                before = file.seek(0, os.SEEK_END)
                try:
                    written = file.write(line.encode())
                    if written != len(line.encode()):
                        raise OSError(28, "No space left on device")  # the disk took only a part
                except BaseException:
                    file.truncate(before)  # no half line
                    raise
        except OSError as e:
            raise disk_error(e, self.path) from e

    def read(self) -> list[dict[str, Any]]:
        """All whole lines; a last line cut short by a crash does not count."""
        if not self.path.exists():
            return []
        lines = self.path.read_text().split("\n")[:-1]  # what follows the last newline is cut short
        return [json.loads(line) for line in lines]

    def truncate_after(self, step: int) -> None:
        """Forget every line later than `step`, and a half-written one."""
        if self.path.exists():
            kept = [line for line in self.read() if line["step"] <= step]
            text = "".join(json.dumps(line) + "\n" for line in kept)
            if text != self.path.read_text():
                write_atomic(self.path, text)

    def sync(self) -> None:
        """Before a state is saved, so that a power failure can't leave it without its lines."""
        if self.path.exists():
            try:
                _sync(self.path)
            except OSError as e:
                raise disk_error(e, self.path) from e


def _aside(path: Path, what: str) -> Path:
    return path.with_name(f".{path.name}.{what}")


def _sync(path: Path) -> None:
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
