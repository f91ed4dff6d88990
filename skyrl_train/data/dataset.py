"""``load_prompts``: files, folders and Hugging Face data sets as one list of prompts."""

from __future__ import annotations

import glob
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import overload

from skyrl_train.data.files import READERS, Located, find_files, read_rows
from skyrl_train.data.hub import read_hub, split_name
from skyrl_train.data.rows import to_prompt
from skyrl_train.errors import DataError
from skyrl_train.types import Message, Prompt


class PromptDataset(Sequence[Prompt]):
    """The prompts of a run, in the order of their sources."""

    def __init__(self, prompts: Sequence[Prompt], sources: Sequence[str] = ()) -> None:
        self.prompts = list(prompts)
        self.sources = list(sources)

    def __len__(self) -> int:
        return len(self.prompts)

    @overload
    def __getitem__(self, index: int) -> Prompt: ...
    @overload
    def __getitem__(self, index: slice) -> list[Prompt]: ...
    def __getitem__(self, index: int | slice) -> Prompt | list[Prompt]:
        return self.prompts[index]

    def drop_longer_than(self, tokenize: Callable[[Sequence[Message]], int], limit: int) -> int:
        """Drops the prompts of more than ``limit`` tokens and returns how many they were.

        Args:
            tokenize: the number of tokens of a prompt, chat template included.

        Raises:
            DataError: none is left.
        """
        lengths = [tokenize(prompt.messages) for prompt in self.prompts]
        kept = [prompt for prompt, length in zip(self.prompts, lengths, strict=True) if length <= limit]
        dropped = len(self.prompts) - len(kept)
        if dropped and not kept:
            raise DataError(
                f"{', '.join(self.sources) or 'the data'}: all {dropped} prompts are longer than {limit} tokens (the "
                f"shortest has {min(lengths)}). Raise trainer.max_prompt_length."
            )
        self.prompts = kept
        return dropped

    def per_source(self) -> dict[str, int]:
        """How many prompts each ``data_source`` gives."""
        return dict(Counter(prompt.data_source for prompt in self.prompts))

    def fingerprint(self) -> str:
        """A short hash of every prompt, its env and its extras: the same on each machine, another if a row changed."""
        digest = hashlib.sha256()
        for prompt in self.prompts:
            row = [prompt.uid, prompt.env_class, prompt.messages, prompt.extras]
            digest.update(json.dumps(row, sort_keys=True, default=str).encode("utf-8", "surrogatepass"))
        return digest.hexdigest()[:16]


def load_prompts(sources: Sequence[str], *, env_class_default: str | None = None) -> PromptDataset:
    """Reads the prompts of all sources.

    A source is a file (``.parquet``, ``.jsonl``, ``.json``), a glob, a folder of such files, or a Hugging Face data set
    written ``name`` or ``name:split`` (the split is ``train`` where it is not written).

    Args:
        env_class_default: ``environment.env_class``, for rows that name none.

    Raises:
        DataError: names the file, the row and the field.
    """
    if isinstance(sources, str):
        sources = [sources]
    if not sources:
        raise DataError("No data: the list of files is empty. Set data.train_data.")
    prompts: list[Prompt] = []
    taken: set[str] = set()
    for source in sources:
        for name, rows in _open(source):
            for number, (where, row) in enumerate(rows):
                prompt = to_prompt(row, file=name, where=where, number=number, env_class=env_class_default)
                prompts.append(_unique(prompt, Path(name).stem, number, taken))
    if not prompts:
        raise DataError(f"{', '.join(sources)}: there are no rows.")
    return PromptDataset(prompts, sources)


def _open(source: str) -> Iterator[tuple[str, Iterator[Located]]]:
    """Each file (or hub split) of a source: its name, and its rows."""
    if not isinstance(source, str) or not source.strip():
        raise DataError(f"{source!r} is not the name of a file or data set.")
    hub = None if _is_path(source) else split_name(source)
    if hub is not None:
        yield ":".join(hub), read_hub(*hub)
        return
    for path in find_files(source):
        yield str(path), read_rows(path)


def _is_path(source: str) -> bool:
    path = Path(source).expanduser()
    if path.exists() or path.suffix in READERS:
        return True
    return glob.has_magic(source) and ":" not in source  # ``name:train[:10%]`` is a slice of a split


def _unique(prompt: Prompt, file: str, number: int, taken: set[str]) -> Prompt:
    """The prompt with a uid that no earlier one has: groups are told apart by it."""
    uid, copy = prompt.uid, 1
    while uid in taken:
        stem = f"{prompt.data_source}/{file}/{number}"
        uid = stem if copy == 1 else f"{stem}#{copy}"
        copy += 1
    taken.add(uid)
    return prompt if uid == prompt.uid else replace(prompt, uid=uid)
