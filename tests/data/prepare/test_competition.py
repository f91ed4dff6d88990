"""math: MATH, MATH-500, AIME and AMC."""

from __future__ import annotations

import pytest

from skyrl_train.data.prepare.competition import boxed


def test_math(raw, prepared, capsys):
    splits = prepared("math", raw=raw("math"))
    counts = {name: len(rows) for name, rows in splits.items()}
    assert counts == {"train": 7474 - 4, "validation": 500, "aime_2024": 30, "amc_2022_2023": 83}
    assert "left out: 4 (no answer is known)" in capsys.readouterr().out
    assert {p.env_class for rows in splits.values() for p in rows} == {"math"}
    assert splits["amc_2022_2023"][0].extras["reward_spec"]["ground_truth"] == "142"
    first = splits["validation"][0]
    assert first.uid == "math500/0"
    assert first.extras["reward_spec"]["ground_truth"] == r"\left( 3, \frac{\pi}{2} \right)"
    assert first.extras["extra_info"] == {"subject": "Precalculus", "level": "2"}


def test_intervals_stay_text(raw, prepared):
    """They would be lists if every ground truth that parses as JSON were decoded."""
    truths = [p.extras["reward_spec"]["ground_truth"] for p in prepared("math", raw=raw("math"))["train"]]
    assert "[-2,4]" in truths
    assert all(isinstance(truth, str) for truth in truths)


@pytest.mark.parametrize(
    ("solution", "answer"),
    [
        (r"so \boxed{7}.", "7"),
        (r"\boxed{1} but \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}", None),
        ("seven", None),
    ],
)
def test_boxed(solution, answer):
    assert boxed(solution) == answer
