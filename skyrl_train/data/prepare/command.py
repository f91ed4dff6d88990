"""``skyrl data NAME --out DIR``: prepares a task's data and says what was kept and what was not."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from skyrl_train.data.prepare.options import PrepareOptions, Row, Splits
from skyrl_train.data.prepare.table import PREPARERS, find_preparer
from skyrl_train.errors import ConfigError, DataError

_TASK_OPTIONS: dict[str, tuple[type, str]] = {
    "size": (int, "training rows (addition, guess, reasoning_gym)"),
    "validation_size": (int, "held-out rows (addition, svamp, wordle, text2sql, reasoning_gym)"),
    "digits": (int, "most digits of an operand (addition: 2)"),
    "low": (int, "lowest number (guess: 1)"),
    "high": (int, "highest number (guess: 7)"),
    "max_turns": (int, "guesses or queries allowed (guess: 3, wordle: 6, text2sql: 5)"),
    "feedback": (float, "how often the worked player uses what it was told (guess: 0.5)"),
    "settings": (str, "JSON object of the task's own settings (reasoning_gym)"),
    "hold_out_db": (str, "databases to hold out whole, separated by commas (text2sql)"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of ``skyrl data``."""
    parser.add_argument("name", metavar="NAME", help=f"{', '.join(PREPARERS)}:<task>")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to write train.parquet etc. to")
    parser.add_argument("--raw", type=Path, metavar="DIR", help="folder of local raw files (default: the hub)")
    parser.add_argument("--limit", type=int, metavar="N", help="at most N rows a split")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of what is drawn or split by chance")
    group = parser.add_argument_group("options of single tasks")
    for name, (kind, text) in _TASK_OPTIONS.items():
        group.add_argument("--" + name.replace("_", "-"), type=kind, help=text)


def run(args: argparse.Namespace) -> int:
    """Prepares what the parsed arguments ask for. Returns 0; errors are of our tree."""
    task = {name: value for name in _TASK_OPTIONS if (value := getattr(args, name, None)) is not None}
    prepare_data(args.name, args.out, raw=args.raw, limit=args.limit, seed=args.seed, **task)
    return 0


def prepare_data(
    name: str, out: Path, *, raw: Path | None = None, limit: int | None = None, seed: int = 0, **task: Any
) -> dict[str, Path]:
    """Writes ``<split>.parquet`` for each split into ``out`` and prints the counts. Returns the files.

    Raises:
        ConfigError: an unknown task or option, or a value that it cannot have.
        DataError: raw files that cannot be had or used.
    """
    if limit is not None and limit < 1:
        raise ConfigError("--limit", limit, "must be at least 1.")
    if raw is not None and not raw.expanduser().is_dir():
        raise DataError(f"{raw}: there is no such folder. --raw names the folder of the raw files.")
    out = Path(out).expanduser()
    prepare = find_preparer(name)
    _make_folder(out)
    options = PrepareOptions(name=name, out=out, raw=raw, limit=limit, seed=seed, task=task)
    splits = prepare(options)
    for split, rows in splits.items():
        if not rows:
            raise DataError(f"{name}: no row is left for {split}. {_fates(options)}")
        if limit is not None and len(rows) > limit:
            options.dropped[f"over --limit ({split})"] += len(rows) - limit
            del rows[limit:]
    files = write_splits(splits, out)
    for split, path in files.items():
        print(f"{path}: {len(splits[split]):,} rows")
    if fates := _fates(options):
        print(fates)
    return files


def write_splits(splits: Splits, out: Path) -> dict[str, Path]:
    """Writes each split; a file appears under its name when it is whole."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    files = {}
    for split, rows in splits.items():
        path = out / f"{split}.parquet"
        part = path.with_suffix(".parquet.part")
        try:
            pq.write_table(pa.Table.from_pylist(_same_fields(rows)), part)
            os.replace(part, path)
        except OSError as error:
            raise DataError(f"{path}: the file cannot be written ({error.strerror or error}).") from error
        files[split] = path
    return files


def _same_fields(rows: list[Row]) -> list[Row]:
    """The rows without empty structs, which Parquet cannot hold."""
    hollow = [name for name in rows[0] if all(row[name] == {} for row in rows)]
    return [{name: value for name, value in row.items() if name not in hollow} for row in rows]


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{out}: the folder cannot be made ({error.strerror or error}).") from error


def _fates(options: PrepareOptions) -> str:
    dropped = {reason: count for reason, count in options.dropped.items() if count}
    if not dropped:
        return ""
    return "left out: " + "; ".join(f"{count:,} ({reason})" for reason, count in dropped.items())
