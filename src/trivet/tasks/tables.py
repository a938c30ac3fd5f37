"""Rows of a file or of a data set's directory, as the Hugging Face hub stores them: JSONL, JSON, CSV, Parquet.

    data/train-00000-of-00002.parquet ...    main/test.jsonl    train.csv    test/part-1.json

The files of a split start with its name or lie in a folder of that name. Every row comes with its place, so
that what is wrong with it can be said. Left out: scripts, streaming, images. (Parquet: pip install 'trivet[data]')
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trivet.config import UserError

Row = tuple[str, dict[str, Any] | str]  # where it stands, and the row or what is wrong with it


def read_rows(path: Path) -> list[Row]:
    """The rows of one file, by its suffix; another one is read as JSONL."""
    try:
        return list(READERS.get(path.suffix, _jsonl)(path))
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        raise UserError(f"The examples in {str(path)!r} can't be read: {e}.") from None


def split_files(folder: Path, split: str) -> list[Path]:
    """The files of a split, in order. Raises UserError where there are none, or where two configurations have some."""
    known = sorted(p for p in folder.rglob("*") if p.suffix in READERS and p.is_file())
    found = [p for p in known if p.parent.name == split or p.name.startswith((f"{split}.", f"{split}-", f"{split}_"))]
    if not found:
        names = ", ".join(str(p.relative_to(folder)) for p in known[:4]) or "nothing"
        raise UserError(f"{folder} has no files of a split {split!r}; it holds {names}.")
    folders = sorted({str(p.parent) for p in found})
    if len(folders) > 1:
        raise UserError(f"{folder} has a split {split!r} in {' and in '.join(folders[:2])}: give one of them as path.")
    return found


def _jsonl(path: Path) -> Iterator[Row]:
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if not line.strip():
            continue
        try:
            data = json.loads(line)
        except ValueError as e:
            yield f"line {number}", f"not valid JSON ({e})."
            continue
        yield f"line {number}", data if isinstance(data, dict) else "not a JSON object."


def _json(path: Path) -> Iterator[Row]:
    try:
        data = json.loads(path.read_text())
    except ValueError as e:
        raise UserError(f"{path} is not valid JSON: {e}; one object a line would be a .jsonl.") from None
    if not isinstance(data, list):
        raise UserError(f"{path} should hold a list of objects, not {type(data).__name__}.")
    for number, row in enumerate(data):
        yield f"row {number}", row if isinstance(row, dict) else "not a JSON object."


def _csv(path: Path) -> Iterator[Row]:
    with path.open(newline="") as file:
        for number, row in enumerate(csv.DictReader(file, restkey="", restval=None)):
            whole = "" not in row and None not in row.values()
            yield f"row {number}", row if whole else "not as many fields as the header."


def _parquet(path: Path) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"Reading {path} needs pyarrow: pip install 'trivet[data]'") from None
    try:
        file = pyarrow.parquet.ParquetFile(path)
        number = 0
        for batch in file.iter_batches():
            for row in batch.to_pylist():
                yield f"row {number}", row
                number += 1
    except pyarrow.ArrowException as e:
        raise UserError(f"{path} can't be read as Parquet: {e}.") from None


READERS = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet}
