from __future__ import annotations

import hashlib
import json
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from skyrl_train.envs.sqlite_query import query
from skyrl_train.errors import ConfigError, EnvError

Make = Callable[..., Any]
FOREVER = "WITH RECURSIVE t(x) AS (SELECT 1 UNION ALL SELECT x+1 FROM t) SELECT"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one small database."""
    path = tmp_path_factory.mktemp("db")
    with closing(sqlite3.connect(path / "shop.sqlite")) as db:
        db.executescript(
            "CREATE TABLE item(name TEXT, price REAL, n INTEGER);"
            "INSERT INTO item VALUES ('pen', 1.5, 3), ('ink', 0.1, 2), ('ink', 0.2, 2), ('cap', NULL, 0);"
        )
        db.commit()
    return path


@pytest.fixture
def shop(make: Make, folder: Path) -> Callable[..., Any]:
    def build(*gold: str, max_turns: int = 5, **settings: Any) -> Any:
        truth = {"gold": list(gold or ("SELECT 1",))}
        return make("text2sql", truth, {"db_path": str(folder), **settings}, db="shop", max_turns=max_turns)

    return build


@pytest.mark.parametrize(
    ("gold", "solution", "reward"),
    [
        ("SELECT name FROM item", "SELECT name AS other FROM item ORDER BY n", 1),
        ("SELECT name FROM item", "SELECT DISTINCT name FROM item", 0),
        ("SELECT name, n FROM item", "SELECT n, name FROM item", 0),
        ("SELECT name, n FROM item", "SELECT name FROM item", 0),
        ("SELECT sum(price) FROM item WHERE name='ink'", "SELECT 0.3", 1),
        ("SELECT sum(n) FROM item", "SELECT 7.0", 1),
        ("SELECT sum(n) FROM item", "SELECT '7'", 0),
        ("SELECT price FROM item WHERE n=0", "SELECT NULL", 1),
        ("SELECT price FROM item WHERE n=0", "SELECT 'NULL'", 0),
        ("SELECT name FROM item WHERE n>9", "SELECT name FROM item WHERE n>8", 1),
        ("SELECT name FROM item WHERE n>9", "SELECT name, n FROM item WHERE n>8", 0),
        ("SELECT 1", "```sql\nSELECT 1\n```", 1),
        ("SELECT 1", "SELECT 1;", 1),
        ("SELECT 1", "SELECT 1; SELECT 1", 0),
        ("SELECT 1", "", 0),
        ("SELECT 1", f"{FOREVER} 1 FROM t", 0),
    ],
)
def test_the_same_rows(shop: Callable[..., Any], gold: str, solution: str, reward: float) -> None:
    result = shop("SELECT 'never'", gold).step(f"<sql>no</sql> I am sure: <solution>{solution}</solution>")
    assert (result.reward, result.terminated) == (reward, True)


def test_looking_before_answering(shop: Callable[..., Any]) -> None:
    env = shop("SELECT 7", max_turns=3)
    first = env.step("<sql>SELECT name, price FROM item WHERE n IN (0, 3)</sql>")
    text = first.observations[0]["content"]
    assert text == "name | price\npen | 1.5\ncap | NULL\nTurns left: 2." and first.reward == 0
    assert "<sql>" in env.step("let me think").observations[0]["content"]
    last = env.step("<sql>SELECT 7</sql>")
    assert (last.terminated, last.reward, last.metadata) == (True, 0.0, {"answered": False, "turns": 3})


def test_what_is_shown_is_bounded(shop: Callable[..., Any]) -> None:
    env = shop(max_turns=9)
    many = env.step(f"<sql>{FOREVER} x, hex(zeroblob(400000)) FROM t</sql>").observations[0]["content"]
    assert len(many) < 2100
    assert "over 10000 rows" in env.step(f"<sql>{FOREVER} x FROM t</sql>").observations[0]["content"]
    assert env.step("<sql>SELECT 1 WHERE 0</sql>").observations[0]["content"].startswith("no rows")
    assert "n | INTEGER" in env.step("<sql>PRAGMA table_info(item)</sql>").observations[0]["content"]


@pytest.mark.parametrize(
    "sql",
    [
        "DROP TABLE item",
        "DELETE FROM item",
        "UPDATE item SET n=9",
        "INSERT INTO item VALUES ('x', 1, 1)",
        "CREATE TABLE x(a)",
        "CREATE TEMP TABLE x(a)",
        "ATTACH 'FOLDER/new.db' AS x",
        "VACUUM INTO 'FOLDER/new.db'",
        "PRAGMA journal_mode=WAL",
        "PRAGMA writable_schema=1",
        "PRAGMA query_only=0",
        "BEGIN EXCLUSIVE",
        "SELECT load_extension('x')",
        "SELECT writefile('FOLDER/new.db', 'x')",
        "SELECT readfile('/etc/passwd')",
        "SELECT randomblob(1000000000)",
        "SELECT nope",
        "SELECT 'a\0b'",
        "SELECT '\ud800'",
        "SELECT " + "(" * 5000 + "1" + ")" * 5000,
        "SELECT '" + "x" * 600_000 + "'",
        "not sql at all",
        "EXPLAIN DROP TABLE item",
    ],
)
def test_a_query_changes_nothing_and_gets_an_error(folder: Path, sql: str) -> None:
    before = hashlib.sha256((folder / "shop.sqlite").read_bytes()).hexdigest()
    answer = query(str(folder / "shop.sqlite"), sql.replace("FOLDER", str(folder)), 10, 5.0)
    assert list(answer) == ["error"] and len(answer["error"]) <= 500
    assert sorted(path.name for path in folder.iterdir()) == ["shop.sqlite"]
    assert hashlib.sha256((folder / "shop.sqlite").read_bytes()).hexdigest() == before


@pytest.mark.parametrize(
    "sql",
    [
        f"{FOREVER} count(*) FROM t",
        "SELECT count(*) FROM item " + ", item ".join("abcdefghijklmnop"),
        f"SELECT group_concat(x) FROM ({FOREVER} x FROM t)",
    ],
)
def test_a_query_that_runs_forever_is_ended(shop: Callable[..., Any], sql: str) -> None:
    env = shop(query_timeout=0.3)
    env.step("<sql>SELECT 1</sql>")  # a helper is there
    start = time.monotonic()
    assert "error: " in env.step(f"<sql>{sql}</sql>").observations[0]["content"]
    assert time.monotonic() - start < 5


def test_every_gold_query_is_right_on_its_database(make: Make, raw: Callable[[str], Path], tmp_path: Path) -> None:
    for dump in (raw("text2sql") / "sqlite").glob("*.sql"):
        with closing(sqlite3.connect(tmp_path / f"{dump.stem}.sqlite")) as db:
            db.executescript(dump.read_text(encoding="utf-8"))
            db.commit()
    rows = [json.loads(line) for line in (raw("text2sql") / "questions.jsonl").read_text("utf-8").splitlines()]
    count = 0
    for row, other in zip(rows, rows[1:] + rows[:1], strict=True):
        for gold in row["gold"]:
            env = make("text2sql", json.dumps({"gold": row["gold"]}), {"db_path": str(tmp_path)}, db=row["db"])
            assert env.step(f"<solution>{gold}</solution>").reward == 1, gold
            count += 1
        if other["db"] != row["db"]:  # its tables are not there
            assert env.step(f"<solution>{other['gold'][0]}</solution>").reward == 0
    assert count == 421


@pytest.mark.parametrize("name", ["nothing", "../shop", "/etc/passwd", "", None, 3, "a\0b"])
def test_a_database_that_is_not_there_is_named(make: Make, folder: Path, name: Any) -> None:
    with pytest.raises(EnvError, match=r"source/7: (extra_info\.db|.*does not exist)"):
        make("text2sql", {"gold": ["SELECT 1"]}, {"db_path": str(folder)}, db=name)


def test_spiders_layout_is_found(make: Make, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "shop").mkdir()
    (tmp_path / "shop" / "shop.sqlite").write_bytes((folder / "shop.sqlite").read_bytes())
    env = make("text2sql", "SELECT count(*) FROM item", {"db_path": str(tmp_path)}, db="shop")
    assert env.step("<solution>SELECT 4</solution>").reward == 1


@pytest.mark.parametrize("path", [None, "/no/such/folder"])
def test_a_folder_that_is_not_there_is_named(make: Make, path: str | None) -> None:
    with pytest.raises(ConfigError, match=r"environment\.skyrl_gym\.text2sql\.db_path"):
        make("text2sql", {"gold": ["SELECT 1"]}, {"db_path": path}, db="shop")


@pytest.mark.parametrize("truth", [{"gold": []}, {"gold": [3]}, {"gold": " "}, {"other": 1}, 7])
def test_wrong_gold_queries_are_named(make: Make, folder: Path, truth: Any) -> None:
    with pytest.raises(EnvError, match="ground_truth"):
        make("text2sql", truth, {"db_path": str(folder)}, db="shop")


def test_a_gold_query_that_fails_is_not_the_policys_fault(shop: Callable[..., Any]) -> None:
    with pytest.raises(EnvError, match="gold='SELECT nope' does not run"):
        shop("SELECT nope").step("<solution>SELECT 1</solution>")
