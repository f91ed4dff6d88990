"""A folder that is put in its place whole: never half of it, and nothing of another kind gives way."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from skyrl_train.errors import ModelError

MODEL = "config.json"
"""The file by which a model folder is known."""


def replace_folder(folder: Path, write: Callable[[Path], None], mark: str = MODEL) -> None:
    """Lets ``write`` fill a folder beside ``folder`` and puts it there whole; an older one of its kind gives way.

    Args:
        mark: the file by which a folder of this kind is known.

    Raises:
        ModelError: something of another kind is there. It is left alone.
    """
    check_replaceable(folder, mark)
    partial, old = (folder.with_name(f"{folder.name}.{word}") for word in ("partial", "old"))
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir(parents=True)
    write(partial)
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def check_replaceable(folder: Path, mark: str = MODEL) -> None:
    """Raises ModelError unless ``folder`` is absent, empty, or has the file ``mark`` and no folders in it."""
    if not folder.exists():
        return
    held = list(folder.iterdir()) if folder.is_dir() else None
    if held is None or (held and (not (folder / mark).is_file() or any(p.is_dir() for p in held))):
        kind = "a file" if held is None else "a folder with other things in it"
        raise ModelError(f"'{folder}' is {kind}, and a model would replace it. Name a folder of its own.")
    if folder.resolve() == Path.cwd():
        raise ModelError(f"'{folder}' is the folder of this process. Name another.")
