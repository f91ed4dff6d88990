from __future__ import annotations

import json
import math
from enum import StrEnum
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from skyrl_train.errors import SkyRLError
from skyrl_train.tracking import json_lines

ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(exclude_categories=())),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.integers() | st.floats(), inner),
    max_leaves=12,
)


def strict(text: str):
    """Parses as a reader that knows the standard only: NaN and Infinity are no JSON."""

    def refuse(constant: str):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


@given(st.dictionaries(st.text(), ANYTHING))
def test_whatever_is_written_is_one_line_of_standard_json(row):
    line = json_lines.encode(json_lines.dumps(row))
    assert b"\n" not in line
    assert isinstance(strict(line.decode()), dict)


@given(st.floats())
def test_a_number_comes_back(value):
    back = json_lines.number(strict(json_lines.dumps({"x": value}))["x"])
    assert back == value or (math.isnan(value) and back is not None and math.isnan(back))


@pytest.mark.parametrize("value", [None, True, "0.5", "nan", [1], {}])
def test_what_is_no_number_gives_none(value):
    assert json_lines.number(value) is None


@given(st.lists(st.one_of(st.integers(), st.floats(), st.booleans(), st.none(), st.text()), max_size=4), st.floats())
def test_long_lists_come_back_as_short_ones_do(mixed, value):
    for held in ([value] * json_lines.LONG, [0.5] * json_lines.LONG + mixed, list(range(json_lines.LONG))):
        alone = [strict(json_lines.dumps([each]))[0] for each in held]
        assert strict(json_lines.dumps({"ids": held, "n": 1})) == {"ids": alone, "n": 1}


def test_what_json_does_not_know_becomes_what_is_nearest():
    class Color(StrEnum):
        RED = "red"

    loop: list = []
    loop.append(loop)
    row = {
        "array": np.arange(3),
        "scalar": np.float32(0.5),
        "broken": np.array([1.0, np.nan]),
        "enum": Color.RED,
        "path": Path("a/b"),
        "set": {2, 1},
        "tuple": (1, math.inf),
        (1, 2): "odd key",
        "loop": loop,
    }
    assert strict(json_lines.dumps(row)) == {
        "array": [0, 1, 2], "scalar": 0.5, "broken": [1.0, "NaN"], "enum": "red", "path": "a/b", "set": [1, 2],
        "tuple": [1, "Infinity"], "(1, 2)": "odd key", "loop": ["..."],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("before", "after", "removed"),
    [
        (b"", b"", 0),
        (b'{"a":1}\n', b'{"a":1}\n', 0),
        (b'{"a":1}\n{"a":2', b'{"a":1}\n', 6),
        (b'{"a":1}\n{"a":2}', b'{"a":1}\n{"a":2}\n', 0),  # whole, only the newline is missing
        (b'{"a":', b"", 5),
        (b'{"a":1}\n' + b"\0" * 300_000, b'{"a":1}\n', 300_000),  # what some file systems leave after a power cut
        (b'{"a":1}\n2', b'{"a":1}\n', 1),  # "23}" torn at "2" parses, but is no row
    ],
)
def test_repair(tmp_path: Path, before: bytes, after: bytes, removed: int):
    file = tmp_path / "x.jsonl"
    file.write_bytes(before)
    assert json_lines.repair(file) == removed
    assert file.read_bytes() == after
    assert json_lines.repair(file) == 0


def test_every_way_to_tear_the_last_line_is_repaired(tmp_path: Path):
    file = tmp_path / "x.jsonl"
    first, second = (json_lines.dumps({"step": n, "name": "größe"}) + "\n" for n in (1, 2))
    whole = json_lines.encode(first + second)
    for length in range(len(json_lines.encode(first)), len(whole) + 1):
        file.write_bytes(whole[:length])
        json_lines.repair(file)
        json_lines.append(file, {"step": 3})
        steps = [row["step"] for row in json_lines.read(file)]
        assert steps == ([1, 2, 3] if length >= len(whole) - 1 else [1, 3])


def test_reading_while_the_last_line_is_written_leaves_it_out(tmp_path: Path):
    file = tmp_path / "x.jsonl"
    file.write_text('{"a":1}\n{"a":')
    assert list(json_lines.read(file)) == [{"a": 1}]
    assert list(json_lines.read(tmp_path / "absent")) == []


def test_cut_moves_rows(tmp_path: Path):
    file, removed = tmp_path / "x.jsonl", tmp_path / "removed.jsonl"
    for n in range(5):
        json_lines.append(file, {"n": n, "x": math.nan})
    assert json_lines.cut(file, lambda row: row["n"] < 3, removed) == 2
    assert json_lines.cut(file, lambda row: row["n"] < 2, removed) == 1
    assert [row["n"] for row in json_lines.read(file)] == [0, 1]
    assert [row["n"] for row in json_lines.read(removed)] == [3, 4, 2]


def test_a_full_disk_is_an_error_of_ours():
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    with pytest.raises(SkyRLError, match=r"/dev/full: cannot be written: No space left"):
        json_lines.append(Path("/dev/full"), {"a": 1})
