"""``text2sql``: questions about small SQLite databases. Raw files: questions.jsonl and sqlite/<db>.sql.

Writes the databases as ``DIR/databases/<db>.sqlite``, the folder for ``environment.skyrl_gym.text2sql.db_path``.
"""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing
from pathlib import Path

from skyrl_train.data.files import read_rows
from skyrl_train.data.prepare.options import PrepareOptions, Row, Splits, hold_out, make_row, text_of
from skyrl_train.errors import ConfigError, DataError

_STEPS = 50_000_000
"""SQLite steps that a gold query may take, some seconds, before it counts as broken."""


def prepare(options: PrepareOptions) -> Splits:
    """Holds out 55 questions, or with ``--hold-out-db`` all those of some databases."""
    task = options.take(max_turns=5, validation_size=55, hold_out_db="")
    raw = [row for _, row in read_rows(options.raw_file("questions.jsonl"))]
    databases = {name: _build(options, name) for name in sorted({text_of(options, row, "db") for row in raw})}
    rows = [made for row in raw if (made := _row(options, row, databases, task.max_turns))]
    apart = [name for name in str(task.hold_out_db).split(",") if name]
    if unknown := [name for name in apart if name not in databases]:
        raise ConfigError("--hold-out-db", task.hold_out_db, f"{unknown[0]} is not one of {', '.join(databases)}.")
    if apart:
        train = [row for row in rows if row["extra_info"]["db"] not in apart]
        return {"train": train, "validation": [row for row in rows if row["extra_info"]["db"] in apart]}
    train, held_out = hold_out(rows, task.validation_size, options.random("split"))
    return {"train": train, "validation": held_out}


def _build(options: PrepareOptions, name: str) -> Path:
    """The database of one dump, made anew; it appears under its name when it is whole."""
    dump = options.raw_file(f"sqlite/{name}.sql")
    path = options.out / "databases" / f"{name}.sqlite"
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.unlink(missing_ok=True)
    try:
        with closing(sqlite3.connect(part)) as db:
            db.executescript(dump.read_text(encoding="utf-8"))
            db.commit()
    except (sqlite3.Error, OSError, UnicodeDecodeError) as error:
        part.unlink(missing_ok=True)
        raise DataError(f"{dump}: the dump cannot be loaded into SQLite ({error}).") from error
    os.replace(part, path)
    return path


def _row(options: PrepareOptions, raw: Row, databases: dict[str, Path], max_turns: int) -> Row | None:
    name = text_of(options, raw, "db")
    gold = raw.get("gold")
    if not isinstance(gold, list) or not all(isinstance(query, str) for query in gold):
        raise DataError(f"{options.name}: row {raw.get('id')}: gold={gold!r:.80} must be a list of SQL texts.")
    with closing(sqlite3.connect(f"file:{databases[name]}?mode=ro", uri=True)) as db:
        schema = "\n".join(sql + ";" for (sql,) in db.execute("SELECT sql FROM sqlite_master WHERE type = 'table'"))
        good = [query for query in gold if runs(db, query)]
    options.dropped["gold queries only: the database refuses them"] += len(gold) - len(good)
    if not good:
        options.dropped["no gold query runs on the database"] += 1
        return None
    parts = [
        f"Answer a question with one SQLite query over this database:\n{schema}",
        f"Question: {text_of(options, raw, 'question')}",
        text_of(options, raw, "instructions"),
        f"To look into the database write <sql>QUERY</sql> and you are shown the rows, in at most {max_turns} turns. "
        "Give the final query as <solution>QUERY</solution>.",
    ]
    info = {"db": name, "category": text_of(options, raw, "category"), "id": text_of(options, raw, "id")}
    return make_row(
        "text2sql",
        "\n\n".join(part for part in parts if part),
        {"gold": good},
        extra_info={**info, "max_turns": max_turns},
        worked=[f"<solution>{good[0]}</solution>"],
    )


def runs(db: sqlite3.Connection, query: str) -> bool:
    """Whether the query ends without error and in bounded time."""
    ticks = iter(range(_STEPS // 100_000))
    db.set_progress_handler(lambda: next(ticks, None) is None, 100_000)
    try:
        db.execute(query).fetchall()
    except sqlite3.Error:
        return False
    finally:
        db.set_progress_handler(None, 0)
    return True
