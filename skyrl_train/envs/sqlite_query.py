"""One query on a SQLite file that it cannot change, in bounded time and memory. Runs in a helper of ``killable``."""

from __future__ import annotations

import sqlite3
import time
from contextlib import closing
from pathlib import Path
from typing import Any

_ALLOWED = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_RECURSIVE}
_PRAGMAS = {"table_info", "table_xinfo", "table_list", "foreign_key_list", "index_list", "index_info"}
"""Those that tell what tables there are, with the name of a table at most."""
_NOT_CALLED = {"load_extension", "readfile", "writefile", "edit", "fts3_tokenizer"}
_LIMITS = {
    sqlite3.SQLITE_LIMIT_LENGTH: 1_000_000,  # bytes of a text: randomblob(1e9) and its like
    sqlite3.SQLITE_LIMIT_SQL_LENGTH: 100_000,
    sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH: 1_000,
    sqlite3.SQLITE_LIMIT_ATTACHED: 0,
}
_TOTAL_CHARACTERS = 20_000_000
_SETUP = "PRAGMA query_only = 1; PRAGMA temp_store = 2; PRAGMA hard_heap_limit = 536870912;"
"""No writing, sorting in memory and not in files, and at most 512 MiB of it."""


def query(path: str, sql: str, most_rows: int, seconds: float) -> dict[str, Any]:
    """``{"columns": [...], "rows": [[...]], "more": bool}``, or ``{"error": text}`` where the query is at fault.

    Blobs come back as text ``x'..'``, and texts that are not UTF-8 with replacement marks.

    Args:
        most_rows: rows beyond it are not read, and ``more`` is true.
    """
    deadline = time.monotonic() + seconds
    try:
        with closing(sqlite3.connect(f"{Path(path).absolute().as_uri()}?mode=ro", uri=True)) as db:
            db.text_factory = lambda data: data.decode("utf-8", errors="replace")
            db.executescript(_SETUP)
            for limit, value in _LIMITS.items():
                db.setlimit(limit, value)
            db.set_authorizer(_authorize)
            db.set_progress_handler(lambda: time.monotonic() > deadline, 10_000)
            return _read(db, sql, most_rows)
    except (sqlite3.Error, sqlite3.Warning, ValueError, OverflowError) as error:
        late = time.monotonic() > deadline
        return {"error": f"the query took over {seconds:g} s" if late else str(error)[:500]}
    except MemoryError:
        return {"error": "out of memory"}


def _read(db: sqlite3.Connection, sql: str, most_rows: int) -> dict[str, Any]:
    cursor = db.execute(sql)
    columns = [str(column[0])[:200] for column in cursor.description or ()]
    rows: list[list[Any]] = []
    size = 0
    for row in cursor:
        if len(rows) == most_rows:
            return {"columns": columns, "rows": rows, "more": True}
        cells = [f"x'{cell.hex()}'" if isinstance(cell, bytes) else cell for cell in row]
        size += sum(len(cell) if isinstance(cell, str) else 8 for cell in cells)
        if size > _TOTAL_CHARACTERS:
            return {"error": "the result is too large"}
        rows.append(cells)
    return {"columns": columns, "rows": rows, "more": False}


def _authorize(action: int, first: str | None, second: str | None, database: str | None, origin: str | None) -> int:
    if action in _ALLOWED:
        return sqlite3.SQLITE_OK
    if action == sqlite3.SQLITE_FUNCTION and (second or "").lower() not in _NOT_CALLED:
        return sqlite3.SQLITE_OK
    if action == sqlite3.SQLITE_PRAGMA and (first or "").lower() in _PRAGMAS:
        return sqlite3.SQLITE_OK
    return sqlite3.SQLITE_DENY
