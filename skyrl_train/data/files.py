"""Rows out of files: Parquet, JSON lines, JSON. Loads without torch, transformers or datasets."""

from __future__ import annotations

import glob
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from skyrl_train.errors import DataError

Located = tuple[str, dict[str, Any]]
"""Where a row stands in its file ("row 4", "line 5"), and the row."""


def find_files(source: str) -> list[Path]:
    """The data files that a path, a folder or a glob names, sorted by name.

    Raises:
        DataError: nothing is there, or a folder holds splits that must not be mixed.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return _folder(path)
    if path.is_file():
        if path.suffix not in READERS:
            raise DataError(f"{path}: the ending '{path.suffix}' is not one of {', '.join(READERS)}. Convert the file.")
        return [path]
    if glob.has_magic(source):
        found = sorted(Path(name) for name in glob.glob(str(path), recursive=True))
        files = [file for file in found if file.suffix in READERS and file.is_file()]
        if files:
            return files
        raise DataError(f"{source}: no file of that pattern ends in {', '.join(READERS)}.")
    raise DataError(f"{path}: there is no such file or folder. {_neighbours(path)}")


def read_rows(path: Path) -> Iterator[Located]:
    """The rows of one file, in order.

    Raises:
        DataError: the file cannot be read, is broken, or holds no row; names the file and the line or row.
    """
    empty = True
    try:
        for located in READERS[path.suffix](path):
            empty = False
            yield located
    except OSError as error:
        raise DataError(f"{path}: the file cannot be read ({error.strerror or error}).") from error
    if empty:
        raise DataError(f"{path}: the file holds no rows.")


def _parquet(path: Path) -> Iterator[Located]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    yield f"row {number}", row
                    number += 1
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        if isinstance(error, OSError) and error.errno:
            raise  # of the file system, not of the content
        reason = str(error).splitlines()[0]
        raise DataError(
            f"{path}: this is not a readable Parquet file, or it was cut short, at row {number} ({reason})."
        ) from error


def _json_lines(path: Path) -> Iterator[Located]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield f"line {number}", _object(path, f"line {number}", _decode(path, f"line {number}", line))


def _json(path: Path) -> Iterator[Located]:
    rows = _decode(path, "the file", path.read_bytes())
    if not isinstance(rows, list):
        raise DataError(
            f"{path}: a .json file must hold a list of rows, not {_kind(rows)}. For one row a line use .jsonl."
        )
    for number, row in enumerate(rows):
        yield f"row {number}", _object(path, f"row {number}", row)


READERS: dict[str, Callable[[Path], Iterator[Located]]] = {".parquet": _parquet, ".jsonl": _json_lines, ".json": _json}


def _decode(path: Path, where: str, data: bytes) -> Any:
    try:
        return json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: {where}: byte {error.start} is not UTF-8. Save the file as UTF-8.") from error
    except json.JSONDecodeError as error:
        at = f"line {error.lineno} column {error.colno}" if where == "the file" else f"{where} column {error.colno}"
        raise DataError(f"{path}: {at}: this is not valid JSON ({error.msg}).") from error
    except RecursionError as error:
        raise DataError(f"{path}: {where}: the JSON is nested too deeply.") from error


def _object(path: Path, where: str, row: Any) -> dict[str, Any]:
    if isinstance(row, dict):
        return row
    raise DataError(f"{path}: {where}: a row must be a JSON object with named fields, not {_kind(row)}.")


def _kind(value: Any) -> str:
    return {dict: "an object", list: "a list", str: "a text", type(None): "null"}.get(type(value), f"{value!r:.40}")


def _folder(path: Path) -> list[Path]:
    files = sorted(file for file in path.iterdir() if file.suffix in READERS and file.is_file())
    if not files:
        raise DataError(f"{path}: the folder holds no file that ends in {', '.join(READERS)}.")
    stems = {file.stem for file in files}
    if "train" in stems and stems & {"validation", "test", "val"}:
        names = ", ".join(file.name for file in files)
        raise DataError(f"{path}: the folder holds training and held-out data ({names}). Name one file.")
    return files


def _neighbours(path: Path) -> str:
    if not path.parent.is_dir():
        return f"The folder {path.parent} does not exist; `skyrl data NAME --out {path.parent}` makes one."
    names = sorted(file.name for file in path.parent.iterdir() if file.suffix in READERS)[:5]
    return f"{path.parent} holds {', '.join(names) if names else 'no data file'}."
