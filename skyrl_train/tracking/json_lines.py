"""JSON lines that survive a kill: one object a line, appended in one write, always valid JSON.

JSON has no NaN and no infinity. They are written as the strings ``"NaN"``, ``"Infinity"`` and ``"-Infinity"``, so that
every tool can still read a diverged run, and ``number`` turns them back.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import orjson

from skyrl_train.errors import SkyRLError

Row = dict[str, Any]
LONG = 64
"""Elements from which on a list is worth a second try."""
_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def dumps(value: Any) -> str:
    """One line of JSON. What JSON does not know (arrays, enums, paths, dataclasses, sets) becomes what is nearest."""
    if isinstance(value, dict) and all(type(key) is str for key in value):
        return "{" + ",".join(f"{_dumps(key)}:{_numbers(held) or _dumps(held)}" for key, held in value.items()) + "}"
    return _dumps(value)


def _numbers(value: Any) -> str | None:
    """A long list, such as a trajectory's tokens, ten times as fast. None: it is short, or holds more than numbers."""
    if type(value) is not list or len(value) < LONG:
        return None
    try:
        text = orjson.dumps(value)
    except TypeError:  # it holds what orjson does not know
        return None
    return None if b"n" in text or b'"' in text else text.decode()  # null stands for what is not finite, too


def _dumps(value: Any) -> str:
    try:
        return json.dumps(value, allow_nan=False, ensure_ascii=False, separators=(",", ":"), default=_plain)
    except (ValueError, TypeError):  # a number that is not finite, or a key that is no string: rare, so walk only now
        return json.dumps(_walk(value, ()), allow_nan=False, ensure_ascii=False, separators=(",", ":"))


def number(value: Any) -> float | None:
    """A number of a row, non-finite ones included; None for anything else."""
    if isinstance(value, bool) or value is None:
        return None
    if isinstance(value, int | float):
        return float(value)
    return _NON_FINITE.get(value) if isinstance(value, str) else None


def append(path: Path, row: Mapping[str, Any]) -> None:
    """Adds a row. The line goes out in one write, so that a kill can tear only the last one.

    Raises:
        SkyRLError: the disk is full or the folder cannot be written.
    """
    append_text(path, dumps(row) + "\n")


def append_text(path: Path, text: str) -> None:
    """Adds text, in one write where the system allows it. Errors as ``append``."""
    data = memoryview(encode(text))
    with translate_errors(path):
        file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            while data:
                data = data[os.write(file, data) :]
        finally:
            os.close(file)


def replace_with(path: Path, lines: Iterable[str]) -> None:
    """Writes a whole file so that no reader ever sees half of it. Errors as ``append``."""
    draft = path.with_name(path.name + ".tmp")
    with translate_errors(path):
        with draft.open("wb") as file:
            file.writelines(encode(line) for line in lines)
        os.replace(draft, path)


def read(path: Path) -> Iterator[Row]:
    """The rows of a file, which may still be written to: a torn last line is left out. No file, no rows."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            if (row := _row(line)) is not None:
                yield row


def repair(path: Path) -> int:
    """Takes away what a kill left torn at the end; bytes removed. A whole row that only lacks its newline is kept."""
    if not path.exists() or path.stat().st_size == 0:
        return 0
    with translate_errors(path), path.open("rb+") as file:
        tail = _last_line(file)
        if tail.endswith(b"\n"):
            return 0
        if _row(tail) is not None:
            file.seek(0, os.SEEK_END)
            file.write(b"\n")
            return 0
        file.truncate(file.seek(0, os.SEEK_END) - len(tail))
        return len(tail)


def cut(path: Path, keep: Callable[[Row], bool], removed: Path) -> int:
    """Moves the rows that ``keep`` refuses to the end of ``removed``; their count."""
    rows = list(read(path))
    gone = [row for row in rows if not keep(row)]
    if gone:
        append_text(removed, "".join(dumps(row) + "\n" for row in gone))
        replace_with(path, (dumps(row) + "\n" for row in rows if keep(row)))
    return len(gone)


def encode(text: str) -> bytes:
    """UTF-8. A lone surrogate, which a policy's tokens can decode to, becomes its escape."""
    return text.encode("utf-8", "backslashreplace")


class translate_errors:
    """Turns a full disk or a folder without permission into an error of ours that names the file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError):
            raise SkyRLError(
                f"{self.path}: cannot be written: {error.strerror or error}. Free space or choose another folder with "
                f"hydra.run.dir=FOLDER; trainer.resume_mode=latest goes on from the last checkpoint."
            ) from error


def _last_line(file: Any, block: int = 1 << 16) -> bytes:
    """The bytes after the last newline that something follows, newline included if there is one."""
    end = file.seek(0, os.SEEK_END)
    tail = b""
    while end > 0:
        start = max(0, end - block)
        file.seek(start)
        tail = file.read(end - start) + tail
        if (found := tail.rfind(b"\n", 0, len(tail) - 1)) >= 0:
            return tail[found + 1 :]
        end = start
    return tail


def _row(line: bytes) -> Row | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def _plain(value: Any) -> Any:
    """The nearest JSON value of an object that JSON does not know."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return dict(value)
    if callable(as_list := getattr(value, "tolist", None)):  # numpy arrays and scalars, tensors
        return as_list()
    if isinstance(value, set | frozenset):
        return sorted(value, key=str)
    return str(value)


def _walk(value: Any, parents: tuple[int, ...]) -> Any:
    """``value`` with every non-finite number, odd key and unknown object replaced; a loop ends in ``"..."``."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if value is None or isinstance(value, str | int | float):
        return value
    if id(value) in parents:
        return "..."
    inside = (*parents, id(value))
    if isinstance(value, Mapping):
        return {k if isinstance(k, str) else str(k): _walk(v, inside) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_walk(v, inside) for v in value]
    return _walk(_plain(value), inside)
