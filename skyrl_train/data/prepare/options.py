"""What every preparer is given, and the form of the rows it returns."""

from __future__ import annotations

import difflib
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from skyrl_train.data.files import read_rows
from skyrl_train.data.hub import read_hub
from skyrl_train.data.rows import conversation
from skyrl_train.data.truth import encode
from skyrl_train.errors import ConfigError, DataError, MissingPackageError

Row = dict[str, Any]
Splits = dict[str, list[Row]]


@dataclass(slots=True, kw_only=True)
class PrepareOptions:
    """``skyrl data NAME --out DIR [--raw DIR] [--limit N] [--seed S]`` and the options of the task."""

    name: str
    out: Path
    raw: Path | None = None
    """Folder of local raw files; None takes the hub."""
    limit: int | None = None
    """At most so many rows a split."""
    seed: int = 0
    task: Mapping[str, Any] = field(default_factory=dict)
    """Options of this task alone (``max_turns``); read them with ``take``."""
    dropped: Counter[str] = field(default_factory=Counter)
    """How many rows were left out, for each reason."""

    def take(self, **defaults: Any) -> SimpleNamespace:
        """The task's options over their defaults. Called once by each preparer.

        Raises:
            ConfigError: an option that this task does not have, or a size that is not positive.
        """
        for name in self.task:
            if name not in defaults:
                close = difflib.get_close_matches(name, defaults, n=1)
                known = ", ".join(map(_flag, defaults)) or "none"
                remedy = f"Did you mean {_flag(close[0])}?" if close else f"It has {known}."
                raise ConfigError(_flag(name), self.task[name], f"'{self.name}' has no such option.", remedy)
        chosen = {**defaults, **self.task}
        for name in ("size", "validation_size"):
            if name in chosen and chosen[name] < 1:
                raise ConfigError(_flag(name), chosen[name], "must be at least 1.")
        return SimpleNamespace(**chosen)

    def random(self, purpose: str) -> random.Random:
        """A random stream of its own for each purpose."""
        return random.Random(f"{self.name}/{self.seed}/{purpose}")

    def read(self, file: str, hub: str, *, split: str = "train", config: str | None = None) -> Iterator[Row]:
        """The raw rows: those of ``file`` in the raw folder, or without one of the hub's data set ``hub``.

        Raises:
            DataError: they cannot be had; the message says how else.
        """
        if self.raw is not None:
            yield from (row for _, row in read_rows(self.raw_file(file)))
            return
        try:
            yield from (row for _, row in read_hub(hub, split, config))
        except (DataError, MissingPackageError) as error:
            raise DataError(
                f"{self.name}: {error} Or: `skyrl data {self.name} --raw DIR`, where DIR holds the raw file {file}."
            ) from error

    def raw_file(self, name: str) -> Path:
        """A raw file, or folder, that must exist."""
        if self.raw is None:
            raise DataError(
                f"{self.name}: there is no copy of it on the hub. Give a folder that holds {name}: --raw DIR."
            )
        path = self.raw.expanduser() / name
        if not path.exists():
            raise DataError(f"{self.name}: {path} does not exist. --raw must name the folder that holds {name}.")
        return path

    def drop_seen(self, rows: Sequence[Row], others: Sequence[Row]) -> list[Row]:
        """``rows`` without those whose prompt stands in ``others``, so that nothing held out is trained on."""
        held_out = {conversation(row["prompt"]) for row in others}
        kept = [row for row in rows if conversation(row["prompt"]) not in held_out]
        self.dropped["the same prompt is in the validation data"] += len(rows) - len(kept)
        return kept


def make_row(
    source: str,
    prompt: str,
    ground_truth: Any,
    *,
    env_class: str | None = None,
    extra_info: Mapping[str, Any] | None = None,
    worked: Sequence[str] | None = None,
) -> Row:
    """A row in the form that ``load_prompts`` reads.

    Args:
        ground_truth: a text is stored as it is, anything else as JSON text, so that the column has one type.
        env_class: ``source`` if None.
        worked: a worked answer: the policy's turns and, between them, the env's.
    """
    is_text = isinstance(ground_truth, str)
    reward_spec: Row = {"ground_truth": ground_truth if is_text else encode(ground_truth)}
    if not is_text:
        reward_spec["ground_truth_is_json"] = True
    info = dict(extra_info or {})
    if worked is not None:
        roles = ("assistant", "user")
        info["worked"] = [{"role": roles[i % 2], "content": text} for i, text in enumerate(worked)]
    return {
        "data_source": source,
        "prompt": [{"role": "user", "content": prompt}],
        "env_class": env_class or source,
        "reward_spec": reward_spec,
        "extra_info": info,
    }


def hold_out(rows: Sequence[Any], count: int, rng: random.Random) -> tuple[list[Any], list[Any]]:
    """``(the others, count held out)``, both in their first order.

    Raises:
        DataError: there are fewer than two rows.
        ConfigError: nothing would be left to train on.
    """
    if len(rows) < 2:
        raise DataError(f"{len(rows)} raw rows can be used: too few to train on one and hold out another.")
    if not 0 < count < len(rows):
        raise ConfigError("--validation-size", count, f"must be from 1 to {len(rows) - 1}: there are {len(rows)} rows.")
    chosen = set(rng.sample(range(len(rows)), count))
    return (
        [row for i, row in enumerate(rows) if i not in chosen],
        [row for i, row in enumerate(rows) if i in chosen],
    )


def text_of(options: PrepareOptions, row: Row, *names: str) -> str:
    """The first of the named fields that is there, as a text.

    Raises:
        DataError: none is, so the raw file is not the one that was meant.
    """
    for name in names:
        if isinstance(value := row.get(name), str):
            return value.strip()
    raise DataError(
        f"{options.name}: a raw row has no text field '{names[0]}' (it has {', '.join(row) or 'no field'})."
    )


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
