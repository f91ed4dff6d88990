"""``reasoning_gym:<task>``: any task of the package reasoning-gym, generated here."""

from __future__ import annotations

import difflib
import json
from typing import Any

from skyrl_train.data.prepare.options import PrepareOptions, Row, Splits, make_row
from skyrl_train.data.truth import decode, encode
from skyrl_train.errors import ConfigError, MissingPackageError

_APART = 500_000_000
"""Between the seeds of training and validation data; the package gives row i of a data set the seed ``seed + i``."""


def prepare(options: PrepareOptions) -> Splits:
    """Rows whose ground truth is the package's whole entry, which is what its scoring function needs."""
    task = options.take(size=2000, validation_size=200, settings="{}")
    name = options.name.partition(":")[2]
    sizes = {"train": task.size, "validation": task.validation_size}
    splits: Splits = {}
    for place, (split, size) in enumerate(sizes.items()):
        entries = _create(options, name, size, options.seed + place * _APART, _settings(task.settings))
        splits[split] = [row for i in range(size) if (row := _row(options, name, entries, i))]
    splits["train"] = options.drop_seen(splits["train"], splits["validation"])
    return splits


def _create(options: PrepareOptions, name: str, size: int, seed: int, settings: dict[str, Any]) -> Any:
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        install = 'pip install "skyrl-train[data]"'
        raise MissingPackageError("reasoning-gym", f"the data '{options.name}'", install) from error
    if name not in DATASETS:
        close = difflib.get_close_matches(name, DATASETS, n=3)
        some = ", ".join(sorted(DATASETS)[:5])
        hint = f"Did you mean {', '.join(close)}?" if close else f"It has {len(DATASETS)}, such as {some}."
        raise ConfigError("data set", options.name, "reasoning-gym has no such task.", hint)
    try:
        return reasoning_gym.create_dataset(name, size=size, seed=seed, **settings)
    except (TypeError, ValueError, AssertionError) as error:  # the package checks its settings with assert
        raise ConfigError("--settings", settings, f"reasoning-gym refuses them for '{name}' ({error}).") from error


def _row(options: PrepareOptions, name: str, entries: Any, index: int) -> Row | None:
    """The row, or None where the package's scoring cannot work on what a file can hold."""
    entry = entries[index]
    stored = decode(encode({key: entry.get(key) for key in ("question", "answer", "metadata")}))
    if not _scores_alike(entries, entry, stored):
        options.dropped["its scoring needs Python objects that no file holds"] += 1
        return None
    return make_row(f"reasoning_gym:{name}", entry["question"], stored, extra_info={"task": name})


def _scores_alike(entries: Any, entry: dict[str, Any], stored: dict[str, Any]) -> bool:
    """Whether the package gives its own answer the same score by the stored entry as by the first."""
    answer = entry.get("answer")
    if not isinstance(answer, str):
        return True  # some tasks accept many answers and give none
    try:
        return entries.score_answer(answer, stored) == entries.score_answer(answer, entry)
    except Exception:  # whatever it is, the env would meet it at every answer
        return False


def _settings(text: str) -> dict[str, Any]:
    try:
        settings = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError("--settings", text, f"is not valid JSON ({error.msg}).") from error
    if not isinstance(settings, dict) or settings.keys() & {"size", "seed"}:
        raise ConfigError("--settings", text, "must be a JSON object; size and seed have options of their own.")
    return settings
