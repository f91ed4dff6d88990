"""The folders ``global_step_N`` of a run, each whole or not there, and the pointer to the latest.

A local save writes ``global_step_12.partial`` and renames it when everything is on the disk, so a killed save never
counts. A removal renames to ``global_step_3.removed`` first, so a killed removal leaves nothing that looks whole. Where
a step is saved anew, the old one waits as ``global_step_12.replaced`` until the new one is in place.

Object stores cannot rename a folder, so a remote one is whole once it has ``trainer.json``, which is written last and
removed first. A step that is saved anew is written as ``global_step_12.again``, and moved when that is whole, file by
file and ``trainer.json`` last; who finds that begun finishes it.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from skyrl_train.storage.paths import filesystem, is_remote, sync, write_text

LATEST = "latest_ckpt_global_step.txt"
FACTS = "trainer.json"
_STEP = re.compile(r"global_step_(\d+)")
_CLEARED = "old_one_is_gone"
_AGAIN = re.compile(r"global_step_(\d+)\.again")


class StepFolders(Protocol):
    """What checkpoints ask of the place where they lie. Every method may raise OSError."""

    def path(self, step: int) -> str:
        """Where the checkpoint of a step is, or would be."""
        ...

    def steps(self) -> list[int]:
        """Those of the whole ones, ascending."""
        ...

    def pointed(self) -> int | None:
        """The step that the pointer names."""
        ...

    def repair(self) -> None:
        """Undoes, or finishes, a replacement that a kill cut in two."""
        ...

    def begin(self, step: int) -> str:
        """Removes what killed saves and removals left; makes the folder to write the step into, and returns it."""
        ...

    def commit(self, step: int, facts: str, parts: Iterable[str]) -> None:
        """All is written: makes it durable, adds ``trainer.json``, lets the step count, and points to it.

        Args:
            parts: folders inside it that must hold something.
        """
        ...

    def remove(self, step: int) -> None:
        """Removes a whole one."""
        ...


def step_folders(root: str) -> StepFolders:
    """Those below ``root``, a path or an address."""
    return RemoteStepFolders(root) if is_remote(root) else LocalStepFolders(Path(root).expanduser())


class LocalStepFolders:
    """On a disk, or on what is mounted as one."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, step: int) -> str:
        return str(self._folder(step))

    def steps(self) -> list[int]:
        found = (_STEP.fullmatch(p.name) for p in self.root.glob("global_step_*") if p.is_dir())
        return sorted(int(match[1]) for match in found if match)

    def pointed(self) -> int | None:
        try:
            return int((self.root / LATEST).read_text())
        except (OSError, ValueError):
            return None

    def repair(self) -> None:
        for replaced in self.root.glob("global_step_*.replaced"):
            if not replaced.with_suffix("").exists():
                replaced.rename(replaced.with_suffix(""))

    def begin(self, step: int) -> str:
        self.repair()
        for suffix in ("partial", "removed", "replaced"):
            for rest in self.root.glob(f"global_step_*.{suffix}"):
                shutil.rmtree(rest)
        partial = self._folder(step).with_suffix(".partial")
        partial.mkdir(parents=True)
        return str(partial)

    def commit(self, step: int, facts: str, parts: Iterable[str]) -> None:
        final = self._folder(step)
        partial, replaced = final.with_suffix(".partial"), final.with_suffix(".replaced")
        _require_filled(partial / part for part in parts)
        write_text(str(partial), FACTS, facts)
        for path in (*partial.rglob("*"), partial):
            sync(path)
        if final.exists():
            final.rename(replaced)
        partial.rename(final)
        sync(self.root)
        shutil.rmtree(replaced, ignore_errors=True)
        write_text(str(self.root), LATEST, str(step))

    def remove(self, step: int) -> None:
        removed = self._folder(step).with_suffix(".removed")
        self._folder(step).rename(removed)
        shutil.rmtree(removed)

    def _folder(self, step: int) -> Path:
        return self.root / f"global_step_{step}"


def _require_filled(folders: Iterable[Path]) -> None:
    for folder in folders:
        if not folder.is_dir() or not any(folder.iterdir()):
            raise FileNotFoundError(
                f"nothing of what the workers wrote is in {folder}. Workers on other nodes need a folder that all share"
            )


class RemoteStepFolders:
    """Anywhere that fsspec reaches."""

    def __init__(self, root: str) -> None:
        self.root = root.rstrip("/")
        self._files, self._inner = filesystem(self.root)

    def path(self, step: int) -> str:
        return f"{self.root}/global_step_{step}"

    def steps(self) -> list[int]:
        self._files.invalidate_cache()  # another process may have written since
        names = (str(found).split("/")[-2] for found in self._files.glob(f"{self._inner}/global_step_*/{FACTS}"))
        return sorted(int(match[1]) for match in map(_STEP.fullmatch, names) if match)

    def pointed(self) -> int | None:
        try:
            return int(self._files.cat_file(f"{self._inner}/{LATEST}"))
        except (OSError, ValueError):
            return None

    def repair(self) -> None:
        self._files.invalidate_cache()
        for match in filter(None, map(_AGAIN.fullmatch, self._names())):
            if self._files.exists(f"{self._inner}/{match[0]}/{FACTS}"):
                self._replace(int(match[1]))

    def begin(self, step: int) -> str:
        self.repair()
        whole = self.steps()
        for name in self._names():
            match = _STEP.fullmatch(name)
            if _AGAIN.fullmatch(name) or (match and int(match[1]) not in whole):
                self._remove(name)
        name = f"global_step_{step}.again" if step in whole else f"global_step_{step}"
        self._files.makedirs(f"{self._inner}/{name}", exist_ok=True)
        return f"{self.root}/{name}"

    def commit(self, step: int, facts: str, parts: Iterable[str]) -> None:
        again = f"global_step_{step}.again"
        self._files.invalidate_cache()
        if self._files.exists(f"{self._inner}/{again}"):
            write_text(f"{self.root}/{again}", FACTS, facts)
            self._replace(step)
        else:
            write_text(self.path(step), FACTS, facts)
        write_text(self.root, LATEST, str(step))

    def remove(self, step: int) -> None:
        self._remove(f"global_step_{step}")

    def _replace(self, step: int) -> None:
        """Puts the whole ``again`` in the place of what is there, whole or begun."""
        final, again = f"{self._inner}/global_step_{step}", f"{self._inner}/global_step_{step}.again"
        if not self._files.exists(f"{again}/{_CLEARED}"):
            if self._files.exists(final):
                self._remove(f"global_step_{step}")
            self._files.pipe_file(f"{again}/{_CLEARED}", b"")  # from here on, what is there is new
        files = {str(file).removeprefix(f"{again}/") for file in self._files.find(again)} - {_CLEARED}
        for name in sorted(files, key=lambda name: name == FACTS):
            self._files.makedirs(f"{final}/{name}".rpartition("/")[0], exist_ok=True)
            self._files.mv(f"{again}/{name}", f"{final}/{name}")
        self._files.rm(again, recursive=True)

    def _remove(self, name: str) -> None:
        folder = f"{self._inner}/{name}"
        if self._files.exists(f"{folder}/{FACTS}"):
            self._files.rm_file(f"{folder}/{FACTS}")
        self._files.rm(folder, recursive=True)

    def _names(self) -> list[str]:
        try:
            return [str(path).rstrip("/").rpartition("/")[2] for path in self._files.ls(self._inner, detail=False)]
        except FileNotFoundError:
            return []
