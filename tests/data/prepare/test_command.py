"""``skyrl data``: options, counts, and requests that cannot be served."""

from __future__ import annotations

import argparse
import re

import pytest

from skyrl_train.data import load_prompts
from skyrl_train.data.prepare.command import add_arguments, prepare_data, run, write_splits
from skyrl_train.data.prepare.options import hold_out, make_row
from skyrl_train.data.prepare.table import PREPARERS, find_preparer
from skyrl_train.errors import ConfigError, DataError


def command(*argv: str) -> int:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return run(parser.parse_args(argv))


def test_the_command_line(tmp_path, capsys):
    out = tmp_path / "a" / "b"
    assert command("guess", "--out", str(out), "--limit", "5", "--seed", "3", "--high", "9", "--max-turns", "4") == 0
    assert sorted(path.name for path in out.iterdir()) == ["train.parquet", "validation.parquet"]
    rows = load_prompts([str(out / "train.parquet")])
    assert len(rows) == 5
    assert rows[0].messages[0]["content"] == "guess 1-9 in 4"
    said = capsys.readouterr().out
    assert f"{out / 'train.parquet'}: 5 rows" in said
    assert "left out: 4,091 (over --limit (train)); 4 (over --limit (validation))" in said


def test_the_same_request_writes_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        prepare_data("guess", tmp_path / name, seed=7, size=100)
    assert (tmp_path / "a/train.parquet").read_bytes() == (tmp_path / "b/train.parquet").read_bytes()


def test_every_preparer_is_there():
    for name in PREPARERS:
        assert callable(find_preparer(name))


@pytest.mark.parametrize(
    ("name", "options", "error", "text"),
    [
        ("gsm9k", {}, ConfigError, "Did you mean 'gsm8k'"),
        ("nothing", {}, ConfigError, "is not one of addition, guess"),
        ("gsm8k:main", {}, ConfigError, "is not one of"),
        ("addition", {"limit": 0}, ConfigError, "--limit=0: must be at least 1"),
        ("addition", {"max_turns": 3}, ConfigError, "--max-turns=3: 'addition' has no such option"),
        ("guess", {"max_turn": 3}, ConfigError, "Did you mean --max-turns"),
        ("gsm8k", {"size": 3}, ConfigError, "It has none"),
        ("wordle", {}, DataError, "there is no copy of it on the hub"),
        ("text2sql", {}, DataError, "Give a folder that holds questions.jsonl: --raw DIR"),
    ],
)
def test_requests_that_cannot_be_served(name, options, error, text, tmp_path):
    with pytest.raises(error, match=re.escape(text)):
        prepare_data(name, tmp_path, **options)


@pytest.mark.parametrize("name", ["gsm8k", "math", "countdown", "svamp", "wordle", "text2sql"])
def test_a_raw_folder_without_the_files_names_the_file(name, tmp_path):
    with pytest.raises(DataError, match=r"does not exist. --raw must name the folder"):
        prepare_data(name, tmp_path / "out", raw=tmp_path)


def test_a_raw_folder_that_is_none(tmp_path):
    with pytest.raises(DataError, match="there is no such folder"):
        prepare_data("gsm8k", tmp_path, raw=tmp_path / "absent")


def test_raw_files_of_something_else(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"text": "x"}\n')
    (tmp_path / "test.jsonl").write_text('{"text": "x"}\n')
    with pytest.raises(DataError, match=r"no text field 'question' \(it has text\)"):
        prepare_data("gsm8k", tmp_path / "out", raw=tmp_path)


def test_without_raw_files_and_network_the_error_tells_both_ways(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(DataError, match=r"hub cannot be reached.*`skyrl data gsm8k --raw DIR`"):
        prepare_data("gsm8k", tmp_path)


def test_an_output_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="the folder cannot be made"):
        prepare_data("guess", tmp_path / "file" / "out", size=2)


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    old = write_splits({"train": [make_row("s", "old", "1")]}, tmp_path)["train"]
    before = old.read_bytes()
    (tmp_path / "train.parquet.part").mkdir()  # as good as a full disk
    with pytest.raises(DataError, match="the file cannot be written"):
        write_splits({"train": [make_row("s", "new", "1")]}, tmp_path)
    assert old.read_bytes() == before


def test_rows_come_back_as_they_were_made(tmp_path):
    truths = ["text", '{"a": 1}', {"a": (1, 2)}, [1], 5, None]
    for truth in truths:
        path = write_splits({"t": [make_row("s", "q", truth, worked=["a", "b", "c"])]}, tmp_path)["t"]
        (prompt,) = load_prompts([str(path)])
        assert prompt.extras["reward_spec"] == {"ground_truth": truth}
        assert [m["role"] for m in prompt.extras["extra_info"]["worked"]] == ["assistant", "user", "assistant"]


def test_hold_out_keeps_the_order_and_loses_nothing():
    import random

    rest, held = hold_out(list(range(20)), 6, random.Random(0))
    assert len(held) == 6
    assert sorted(rest + held) == list(range(20))
    assert (rest, held) == (sorted(rest), sorted(held))


@pytest.mark.parametrize("rows", [0, 1])
def test_nothing_can_be_held_out_of_one_row(rows):
    import random

    with pytest.raises(DataError, match="too few"):
        hold_out(list(range(rows)), 1, random.Random(0))
