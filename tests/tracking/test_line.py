from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skyrl_train.tracking.line import duration, eval_scores, score, sparkline, step_line

NAN, INF = math.nan, math.inf


def test_the_whole_line():
    metrics = {
        "reward/mean": 0.534, "response/length_mean": 22.13, "time/generate": 0.212, "tokens_per_s/generate": 9800.4,
        "time/update": 0.31, "time/other": 3.0, "eval/gsm8k/accuracy": 0.71,
    }  # fmt: skip
    assert step_line(12, 100, metrics) == (
        "step 12/100  reward 0.53  len 22.1  gen 0.21s 9,800 tok/s  update 0.31s  eval 0.71"
    )


def test_only_what_is_there():
    assert step_line(0, 0, {}) == "step 0"
    assert step_line(0, 5, {"eval/all/avg_score": 0.4, "eval/math/avg_score": 0.4}) == "step 0/5  eval 0.40"


def test_trouble_is_told():
    metrics = {"trajectories/failed": 3.0, "prompts/lost": 0.0, "policy/skipped_updates": 1.0, "reward/mean": NAN}
    assert step_line(2, 5, metrics) == "step 2/5  reward nan  failed 3  skipped 1"


def test_several_sources():
    metrics = {"eval/all/avg_score": 0.5, "eval/all/pass_at_1": 0.9, "eval/all/failed": 3.0}
    metrics |= {f"eval/org/{name}/avg_score": 0.25 for name in "abcd"}
    assert step_line(1, 1, metrics) == "step 1/1  eval 0.50 (org/a 0.25, org/b 0.25, org/c 0.25, 1 more)"


def test_the_score_of_a_source_is_the_first_kind_it_has():
    metrics = {"eval/a/pass_at_1": 0.1, "eval/a/accuracy": 0.2, "eval/a/avg_score": 0.3, "eval/b/pass_at_1": 0.4}
    assert eval_scores(metrics | {"eval/c/pass_at_8": 1.0, "evaluation/d/accuracy": 1.0}) == {"a": 0.2, "b": 0.4}


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.5, "0.50"), (0, "0.00"), (-1.239, "-1.24"), (0.00123, "0.0012"), (1234.4, "1,234"), (NAN, "nan"), (INF, "inf")],
)
def test_score(value, text):
    assert score(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.206, "0.21s"), (9.99, "9.99s"), (9.996, "10.0s"), (99.94, "99.9s"), (99.96, "1m40s"), (125, "2m05s"),
     (3599.7, "1h00m"), (7380, "2h03m"), (NAN, "nan")],
)  # fmt: skip
def test_duration(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ([], ""),
        ([1, 2, 3, 4, 5, 6, 7, 8], "▁▂▃▄▅▆▇█"),
        ([5, 5, 5], "▄▄▄"),
        ([0, NAN, 1], "▁ █"),
        ([NAN, INF], "  "),
        ([0, 0, 1, 1], "▁▁██"),
        ([1e308, -1e308], "█▁"),
    ],
)
def test_sparkline(values, line):
    assert sparkline(values) == line


def test_a_long_sparkline_shows_means_of_stretches():
    assert sparkline([0.0] * 50 + [1.0] * 50, width=4) == "▁▁██"


@given(st.lists(st.floats()), st.integers(0, 40))
def test_a_sparkline_never_exceeds_its_width(values, width):
    assert len(sparkline(values, width)) == min(width, len(values))
