"""gsm8k and svamp."""

from __future__ import annotations

import json
import re
from fractions import Fraction

import pytest

from skyrl_train.data.prepare.svamp import steps
from skyrl_train.errors import DataError


def test_gsm8k(raw, prepared, capsys):
    splits = prepared("gsm8k", raw=raw("gsm8k"))
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 7473, "validation": 1319}
    assert "left out" not in capsys.readouterr().out
    for rows in splits.values():
        for prompt in rows:
            truth = prompt.extras["reward_spec"]["ground_truth"]
            worked = prompt.extras["extra_info"]["worked"][0]["content"]
            assert re.fullmatch(r"-?\d+(\.\d+)?", truth)
            assert worked.splitlines()[-1].replace(",", "") == f"#### {truth}"
            assert "<<" not in worked
            assert prompt.env_class == "gsm8k"
    first = splits["train"][0]
    assert first.messages[0]["content"].startswith("Natalia sold clips to 48 of her friends")
    assert first.extras["reward_spec"]["ground_truth"] == "72"
    assert first.uid == "gsm8k/0"


def test_gsm8k_rows_without_an_answer_and_of_the_test_are_counted(tmp_path, prepared, capsys):
    good = {"question": "1+1?", "answer": "It is <<1+1=2>>2.\n#### 2"}
    rows = [{**good, "question": f"{i}?"} for i in range(3)]
    bad = [{"question": "none?", "answer": "2"}, {"question": "cut?", "answer": "#### "}]
    for name, content in (("train", [*rows, *bad, good]), ("test", [good])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    assert len(prepared("gsm8k", raw=tmp_path)["train"]) == 3
    said = capsys.readouterr().out
    assert '2 (the solution does not end in "#### NUMBER")' in said
    assert "1 (the same prompt is in the validation data)" in said


def test_svamp(raw, prepared, capsys):
    splits = prepared("svamp", raw=raw("svamp"))
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 700, "validation": 300}
    assert "1 (worked answer only" in capsys.readouterr().out
    everything = [*splits["train"], *splits["validation"]]
    assert len({p.extras["extra_info"]["id"] for p in everything}) == 1000
    worked = [p for p in everything if "worked" in p.extras["extra_info"]]
    assert len(worked) == 999
    for prompt in worked:
        text = prompt.extras["extra_info"]["worked"][0]["content"]
        assert text.endswith(f"#### {prompt.extras['reward_spec']['ground_truth']}")


@pytest.mark.parametrize(
    ("equation", "lines", "total"),
    [
        ("( 76.0 - 25.0 )", ["76 - 25 = 51"], 51),
        ("( 6.0 - ( 3.0 + 2.0 ) )", ["3 + 2 = 5", "6 - 5 = 1"], 1),
        ("( 1.0 / 4.0 )", ["1 / 4 = 0.25"], Fraction(1, 4)),
    ],
)
def test_equations_as_steps(equation, lines, total):
    assert steps(equation) == (lines, total)


@pytest.mark.parametrize("equation", ["", "(1", "x + 1", "1 / 0", "2 ** 9", "__import__('os')", "1 if 1 else 2"])
def test_what_is_no_equation(equation):
    with pytest.raises(ValueError, match="not an equation of numbers"):
        steps(equation)


def test_svamp_raw_rows_that_cannot_be_used(tmp_path, prepared):
    row = {"ID": "chal-1", "Body": "b", "Question": "q", "Equation": "( 1 + x )", "Answer": 2.0, "Type": "Addition"}
    (tmp_path / "SVAMP.json").write_text(json.dumps([row] * 400))
    with pytest.raises(DataError, match="row chal-1: not an equation"):
        prepared("svamp", raw=tmp_path)
