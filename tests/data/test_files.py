"""Good files in each format, and bad ones that end in one error with their name."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from skyrl_train.data.files import find_files, read_rows
from skyrl_train.errors import DataError


def rows(path: Path) -> list[dict]:
    return [row for _, row in read_rows(path)]


def parquet(path: Path, n: int = 3) -> Path:
    pq.write_table(pa.table({"prompt": [f"q{i}" for i in range(n)]}), path, row_group_size=2)
    return path


def test_the_formats_give_the_same_rows(tmp_path):
    want = [{"prompt": f"q{i}"} for i in range(3)]
    (tmp_path / "a.jsonl").write_text("\n\n".join(map(json.dumps, want)))
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(want).encode())
    for path in (parquet(tmp_path / "a.parquet"), tmp_path / "a.jsonl", tmp_path / "a.json"):
        assert rows(path) == want
    assert [where for where, _ in read_rows(tmp_path / "a.jsonl")] == ["line 1", "line 3", "line 5"]
    assert [where for where, _ in read_rows(tmp_path / "a.parquet")] == ["row 0", "row 1", "row 2"]


def test_a_path_a_folder_and_a_glob(tmp_path, monkeypatch):
    for name in ("b.jsonl", "a.jsonl", "note.txt"):
        (tmp_path / name).write_text("{}")
    both = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    assert find_files(str(tmp_path)) == both
    assert find_files(str(tmp_path / "*")) == both
    assert find_files(str(tmp_path / "b.jsonl")) == both[1:]
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    assert find_files(f"~/{tmp_path.name}/a.jsonl") == both[:1]


def write(name: str, data: bytes | str):
    def make(folder: Path) -> Path:
        path = folder / name
        path.write_bytes(data.encode() if isinstance(data, str) else data)
        return path

    return make


def cut_short(folder: Path) -> Path:
    whole = parquet(folder / "whole.parquet", 1000).read_bytes()
    return write("cut.parquet", whole[: len(whole) // 2])(folder)


def damaged(folder: Path) -> Path:
    """The footer is whole, a page in the middle is not."""
    path = folder / "damaged.parquet"
    pq.write_table(
        pa.table({"prompt": [f"{i:040d}" for i in range(2000)]}), path, compression="zstd", use_dictionary=False
    )
    data = bytearray(path.read_bytes())
    data[60 : len(data) // 2] = b"\xff" * (len(data) // 2 - 60)
    return write("damaged.parquet", bytes(data))(folder)


def without_rows(folder: Path) -> Path:
    return parquet(folder / "none.parquet", 0)


def locked(folder: Path) -> Path:
    path = folder / "dir.jsonl"
    path.mkdir()
    return path


BAD = {
    "Parquet cut short": (cut_short, "not a readable Parquet file"),
    "Parquet damaged": (damaged, "at row 0"),
    "Parquet of another format": (write("a.parquet", "PK\x03\x04 not parquet at all"), "not a readable Parquet file"),
    "empty Parquet": (write("a.parquet", ""), "not a readable Parquet file"),
    "Parquet without rows": (without_rows, "holds no rows"),
    "empty JSON lines": (write("a.jsonl", ""), "holds no rows"),
    "blank JSON lines": (write("a.jsonl", "\n \n"), "holds no rows"),
    "broken line": (write("a.jsonl", '{"prompt": "a"}\n{"prompt": \n'), "line 2 column"),
    "two rows on a line": (
        write("a.jsonl", '{"a": 1}{"a": 2}'),
        "line 1 column 9: this is not valid JSON (Extra data)",
    ),
    "line cut short": (write("a.jsonl", '{"prompt": "a"}\n{"prompt": "b'), "line 2 column"),
    "single quotes": (write("a.jsonl", "{'prompt': 'a'}"), "line 1 column 2"),
    "line is a list": (write("a.jsonl", '{"prompt": "a"}\n["b"]\n'), "line 2: a row must be a JSON object with named"),
    "line is a text": (write("a.jsonl", '"b"\n'), "line 1: a row must be a JSON object with named fields, not a text"),
    "line is null": (write("a.jsonl", "null\n"), "not null"),
    "line is a number": (write("a.jsonl", "12\n"), "not 12"),
    "Latin-1": (write("a.jsonl", '{"prompt": "é"}\n'.encode("latin-1")), "line 1: byte 12 is not UTF-8"),
    "UTF-16": (write("a.json", '[{"prompt": "a"}]'.encode("utf-16")), "byte 0 is not UTF-8"),
    "nested without end": (write("a.jsonl", "[" * 100_000), "nested too deeply"),
    "JSON object": (write("a.json", '{"prompt": "a"}'), "must hold a list of rows, not an object"),
    "JSON lines named JSON": (write("a.json", '{"prompt": "a"}\n{"prompt": "b"}'), "line 2 column 1"),
    "JSON list of texts": (write("a.json", '["a"]'), "row 0: a row must be a JSON object"),
    "empty JSON list": (write("a.json", "[]"), "holds no rows"),
    "folder named like a file": (locked, "the file cannot be read (Is a directory)"),
}


@pytest.mark.parametrize(("make", "text"), BAD.values(), ids=BAD)
def test_bad_files_name_the_file_and_the_place(make, text, tmp_path):
    path = make(tmp_path)
    with pytest.raises(DataError) as caught:
        rows(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


def folder_of(*names: str):
    def make(folder: Path) -> str:
        for name in names:
            (folder / name).write_text("{}")
        return str(folder)

    return make


ABSENT = {
    "no such file": (lambda f: f"{f}/trian.parquet", "no such file or folder"),
    "what is there instead": (lambda f: folder_of("train.parquet")(f) + "/trian.parquet", "holds train.parquet"),
    "no such folder": (lambda f: f"{f}/gsm8k/train.parquet", "`skyrl data NAME --out"),
    "unknown ending": (lambda f: folder_of("a.csv")(f) + "/a.csv", "the ending '.csv' is not one of .parquet"),
    "empty folder": (folder_of(), "the folder holds no file that ends in"),
    "folder of other files": (folder_of("a.txt"), "the folder holds no file that ends in"),
    "train and validation": (folder_of("train.jsonl", "validation.jsonl"), "Name one file"),
    "empty glob": (lambda f: f"{f}/*.jsonl", "no file of that pattern"),
}


@pytest.mark.parametrize(("make", "text"), ABSENT.values(), ids=ABSENT)
def test_what_is_not_there(make, text, tmp_path):
    with pytest.raises(DataError) as caught:
        find_files(make(tmp_path))
    assert str(tmp_path) in str(caught.value)
    assert text in str(caught.value)
