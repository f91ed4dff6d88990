"""The databases are built, and every gold query gives the published number of rows."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing

import pytest

from skyrl_train.data.prepare.text2sql import runs
from skyrl_train.errors import ConfigError, DataError


def test_text2sql(raw, prepared, tmp_path, capsys):
    folder = raw("text2sql")
    splits = prepared("text2sql", raw=folder)
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 222, "validation": 55}
    assert "left out" not in capsys.readouterr().out
    databases = sorted((tmp_path / "out" / "databases").iterdir())
    assert [path.suffix for path in databases] == [".sqlite"] * 11
    questions = [json.loads(line) for line in (folder / "questions.jsonl").read_text().splitlines()]
    published = {row["id"]: row["gold_rows"] for row in questions}
    seen = 0
    for rows in splits.values():
        for prompt in rows:
            info, truth = prompt.extras["extra_info"], prompt.extras["reward_spec"]["ground_truth"]
            with closing(sqlite3.connect(tmp_path / "out" / "databases" / f"{info['db']}.sqlite")) as db:
                assert [len(db.execute(sql).fetchall()) for sql in truth["gold"]] == published[info["id"]]
                tables = [name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
            assert all(f"CREATE TABLE {table} (" in prompt.messages[0]["content"] for table in tables)
            seen += 1
    assert seen == 277


def test_whole_databases_held_out(raw, prepared):
    splits = prepared("text2sql", raw=raw("text2sql"), hold_out_db="broker,ewallet")
    where = {name: {p.extras["extra_info"]["db"] for p in rows} for name, rows in splits.items()}
    assert where["validation"] == {"broker", "ewallet"}
    assert len(where["train"]) == 9
    assert len(splits["validation"]) == 22 + 23


def small(folder, **changes):
    row = {"id": "q/0", "db": "d", "category": "c", "question": "how many?", "instructions": "", **changes}
    (folder / "sqlite").mkdir()
    (folder / "sqlite" / "d.sql").write_text("CREATE TABLE t (x int); INSERT INTO t VALUES (1);")
    rows = [{**row, "id": f"q/{i}"} for i in range(3)]
    (folder / "questions.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


def test_gold_queries_that_fail_are_dropped_and_counted(tmp_path, prepared, capsys):
    splits = prepared("text2sql", raw=small(tmp_path, gold=["SELECT x FROM t", "SELECT y FROM t"]), validation_size=1)
    assert splits["train"][0].extras["reward_spec"]["ground_truth"] == {"gold": ["SELECT x FROM t"]}
    assert "3 (gold queries only: the database refuses them)" in capsys.readouterr().out


def test_a_query_without_end_is_stopped(monkeypatch):
    monkeypatch.setattr("skyrl_train.data.prepare.text2sql._STEPS", 1_000_000)
    endless = "WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c) SELECT count(*) FROM c"
    with closing(sqlite3.connect(":memory:")) as db:
        assert not runs(db, endless)
        assert runs(db, "SELECT 1")


@pytest.mark.parametrize(
    ("changes", "options", "error", "text"),
    [
        ({"gold": ["SELECT y FROM t"]}, {}, DataError, "0 raw rows can be used"),
        ({"gold": "SELECT x FROM t"}, {}, DataError, "row q/0: gold='SELECT x FROM t' must be a list"),
        ({"gold": [], "db": "other"}, {}, DataError, r"other\.sql does not exist"),
        ({"gold": ["SELECT 1"]}, {"hold_out_db": "nope"}, ConfigError, "nope is not one of d"),
        ({"gold": ["SELECT 1"]}, {"validation_size": 3}, ConfigError, "must be from 1 to 2"),
        ({"gold": ["SELECT 1"], "question": None}, {}, DataError, "no text field 'question'"),
    ],
)
def test_raw_files_that_cannot_be_used(changes, options, error, text, tmp_path, prepared):
    with pytest.raises(error, match=text):
        prepared("text2sql", raw=small(tmp_path, **changes), **{"validation_size": 1, **options})


def test_a_broken_dump_names_the_file_and_leaves_nothing(tmp_path, prepared):
    folder = small(tmp_path, gold=["SELECT 1"])
    (folder / "sqlite" / "d.sql").write_text("CREATE TABLE t (x int); INSERT INTO u")
    with pytest.raises(DataError, match=r"d\.sql: the dump cannot be loaded into SQLite"):
        prepared("text2sql", raw=folder)
    assert list((tmp_path / "out" / "databases").iterdir()) == []
