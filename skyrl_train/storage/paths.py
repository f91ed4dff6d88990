"""A folder by its name: a local path, or an address that fsspec knows (``s3://bucket/run``, ``gs://bucket/run``)."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)


def is_remote(folder: str) -> bool:
    """Whether fsspec is asked for it. ``file://`` is, too: then this machine behaves as a remote one would."""
    return bool(_ADDRESS.match(folder))


def filesystem(folder: str) -> tuple[Any, str]:
    """The fsspec file system of a remote folder, and the folder's path there.

    Raises:
        ValueError: fsspec does not know the protocol.
        ImportError: the package that speaks it is not installed.
    """
    from fsspec.core import url_to_fs

    files, path = url_to_fs(folder)
    return files, str(path).rstrip("/")


def read_text(folder: str, name: str) -> str:
    """The text of a file.

    Raises:
        OSError: it is not there, or cannot be read.
        UnicodeDecodeError: it is no text.
    """
    if not is_remote(folder):
        return (Path(folder) / name).read_text(encoding="utf-8")
    files, path = filesystem(folder)
    return files.cat_file(f"{path}/{name}").decode("utf-8")


def write_text(folder: str, name: str, text: str) -> None:
    """Replaces a file's text such that a reader sees the old or the new, never a part. It is durable on return."""
    if is_remote(folder):
        files, path = filesystem(folder)
        files.pipe_file(f"{path}/{name}.tmp", text.encode())
        files.mv(f"{path}/{name}.tmp", f"{path}/{name}")
        return
    temporary = Path(folder) / f"{name}.tmp"
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(Path(folder) / name)


def sync(path: Path) -> None:
    """Puts a local file, or a folder's list of names, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def filled(folder: str) -> Iterator[Path]:
    """A local path to write a folder to: itself, or one whose files go to the remote folder afterwards, whole or not
    at all; what was at the remote one is replaced. Nothing is sent where nothing was written."""
    if not is_remote(folder):
        yield Path(folder)
        return
    with tempfile.TemporaryDirectory() as room:
        draft = Path(room) / Path(folder).name
        yield draft
        if not draft.exists():
            return
        files, path = filesystem(folder)
        files.invalidate_cache()
        if files.exists(path):
            files.rm(path, recursive=True)
        files.makedirs(path, exist_ok=True)
        for file in sorted(p for p in draft.rglob("*") if p.is_file()):
            target = f"{path}/{file.relative_to(draft).as_posix()}"
            files.makedirs(target.rpartition("/")[0], exist_ok=True)
            files.put_file(str(file), target)
