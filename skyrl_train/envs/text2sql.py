"""``text2sql``: answer a question with a query on a SQLite database, after looking into it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from skyrl_train.envs.answers import last_tag
from skyrl_train.envs.base import Env, StepResult
from skyrl_train.envs.facts import (
    bad_truth,
    extra_info,
    finish,
    ground_truth,
    mapping_truth,
    read_settings,
    reply,
    turn_limit,
)
from skyrl_train.envs.killable import CallKilledError, shared_pool
from skyrl_train.errors import ConfigError, EnvError
from skyrl_train.types import Prompt

_KEY = "environment.skyrl_gym.text2sql.db_path"
_MOST_ROWS = 10_000
"""Rows that are read of a result. A longer one cannot be compared, so it is not right."""
_GOLD_PATIENCE = 10
"""A gold query may take so many times what a query of the policy may."""
_SHOWN_ROWS, _SHOWN_CHARACTERS = 20, 2000


class Text2SqlEnv(Env):
    """``<sql>QUERY</sql>`` shows rows; ``<solution>QUERY</solution>`` ends the episode.

    1 if the solution gives the same rows as any query of ``ground_truth.gold``, else 0. Rows count as often as they
    occur; their order and the names of columns do not matter, the order of columns does.

    Settings: ``db_path``, the folder of ``<extra_info.db>.sqlite``; ``query_timeout``, seconds for one query. Turns are
    ``extra_info.max_turns`` (5). Databases are opened read-only and nothing but SELECT is let through.
    """

    def __init__(self, prompt: Prompt, settings: dict[str, Any]) -> None:
        super().__init__(prompt, settings)
        chosen = read_settings("text2sql", settings, db_path=None, query_timeout=5.0)
        self.timeout = chosen.query_timeout
        self.path = _database(prompt, chosen.db_path)
        self.gold = _gold_queries(prompt)
        self.turns_left = turn_limit(prompt, 5)
        self.turns = 0

    def step(self, response: str) -> StepResult:
        self.turns += 1
        self.turns_left -= 1
        solution = last_tag(response, "solution")
        if solution is not None:
            return self._judge(solution)
        if self.turns_left <= 0:
            return finish(0.0, answered=False, turns=self.turns)
        query = last_tag(response, "sql")
        if query is None:
            return reply(f"Write <sql>QUERY</sql> or <solution>QUERY</solution>. Turns left: {self.turns_left}.")
        return reply(f"{_shown(_run(self.path, query, self.timeout))}\nTurns left: {self.turns_left}.")

    def _judge(self, solution: str) -> StepResult:
        found = _run(self.path, solution, self.timeout)
        solved = "error" not in found and any(_same(found, self._gold_result(query)) for query in self.gold)
        return finish(solved, answered=True, turns=self.turns, query_failed="error" in found)

    def _gold_result(self, query: str) -> dict[str, Any]:
        try:
            return _gold_result(self.path, Path(self.path).stat().st_mtime_ns, query, self.timeout)
        except ValueError as error:
            where = f"prompt {self.prompt.uid}: reward_spec.ground_truth.gold={query!r:.200}"
            raise EnvError(f"{where} does not run on {self.path}: {error}") from error


def _gold_queries(prompt: Prompt) -> list[str]:
    """``{"gold": [query, ...]}``; a query, or a list of them, alone will do."""
    truth = ground_truth(prompt)
    if isinstance(truth, Mapping) or (isinstance(truth, str) and truth.lstrip().startswith("{")):
        truth = mapping_truth(prompt, "gold")["gold"]
    gold = [truth] if isinstance(truth, str) else truth
    if not isinstance(gold, list) or not gold or not all(isinstance(query, str) and query.strip() for query in gold):
        raise bad_truth(prompt, truth, "a mapping with 'gold', a list of queries")
    return gold


def _database(prompt: Prompt, folder: str | None) -> str:
    """The row's database file: ``<db>.sqlite`` in the folder, or ``<db>/<db>.sqlite`` as in Spider and BIRD."""
    if folder is None:
        raise ConfigError(_KEY, None, "env text2sql needs the folder of its databases.", "`skyrl data` writes one.")
    if not Path(folder).expanduser().is_dir():
        raise ConfigError(_KEY, folder, "there is no such folder.", "`skyrl data text2sql` writes one, databases/.")
    name = extra_info(prompt, "db") or prompt.extras.get("db_id")
    if not isinstance(name, str) or not name or Path(name).name != name or "\0" in name:
        raise EnvError(f"prompt {prompt.uid}: extra_info.db={name!r:.60} must be the name of a database.")
    root = Path(folder).expanduser()
    for path in (root / f"{name}.sqlite", root / name / f"{name}.sqlite"):
        if path.is_file():
            return str(path)
    raise EnvError(f"prompt {prompt.uid}: {root / name}.sqlite does not exist. {_KEY} names the folder.")


def _run(path: str, sql: str, seconds: float) -> dict[str, Any]:
    sql = sql.strip().removeprefix("```sql").removeprefix("```").removesuffix("```").strip()
    try:
        # The query's own deadline comes first; the kill is for what does not look at the clock (LIKE on a long text).
        pool = shared_pool("skyrl_train.envs.sqlite_query:query")
        return pool.call(path, sql, _MOST_ROWS, seconds, timeout=seconds + 2)
    except CallKilledError:
        return {"error": f"the query took over {seconds:g} s"}


@lru_cache(maxsize=4096)
def _gold_result(path: str, _changed: int, sql: str, seconds: float) -> dict[str, Any]:
    """Raises ValueError, which no cache keeps, where the query fails."""
    result = _run(path, sql, _GOLD_PATIENCE * seconds)
    if "error" in result:
        raise ValueError(result["error"])
    return result


def _same(found: dict[str, Any], gold: dict[str, Any]) -> bool:
    if found["more"] or gold["more"] or len(found["columns"]) != len(gold["columns"]):
        return False
    return _counted(found["rows"]) == _counted(gold["rows"])


def _counted(rows: list[list[Any]]) -> Counter[tuple[Any, ...]]:
    return Counter(tuple(_comparable(cell) for cell in row) for row in rows)


def _comparable(cell: Any) -> Any:
    """Numbers to nine digits, so that the order of a sum does not matter; 2.0 is 2; a text is no number."""
    if isinstance(cell, float):
        cell = float(f"{cell:.9g}")
        return int(cell) if cell.is_integer() else cell
    return cell


def _shown(result: dict[str, Any]) -> str:
    """The rows as a small table, or the error."""
    if "error" in result:
        return f"error: {result['error']}"
    rows = result["rows"]
    if not rows:
        return "no rows"
    lines = [" | ".join(result["columns"])]
    lines += [" | ".join("NULL" if cell is None else str(cell)[:200] for cell in row) for row in rows[:_SHOWN_ROWS]]
    if len(rows) > _SHOWN_ROWS:
        lines.append(f"... {'over ' if result['more'] else ''}{len(rows)} rows in all")
    text = "\n".join(lines)
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + " ..."
