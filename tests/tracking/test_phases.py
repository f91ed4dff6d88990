from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skyrl_train.tracking.phases import Phase, StepRecord, covered


@pytest.mark.parametrize(
    ("spans", "seconds"),
    [
        ([], 0),
        ([(0, 2), (3, 4)], 3),
        ([(0, 2), (1, 4)], 4),  # side by side from 1 to 2
        ([(0, 9), (1, 2), (3, 4)], 9),  # one inside the other
        ([(3, 4), (0, 2)], 3),  # in any order
    ],
)
def test_covered(spans, seconds):
    assert covered(spans) == seconds


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)).map(lambda p: (min(p), max(p)))))
def test_covered_counts_each_moment_once(spans):
    moments = {t for start, end in spans for t in range(start, end)}
    assert covered(spans) == len(moments)


def test_a_phase_that_began_before_the_step_counts_from_the_steps_start():
    record = StepRecord(step=3, start=10.0)
    record.add(Phase("generate", "trainer", 2, None, start=4.0, tokens=100), end=12.0)
    assert record.result(15.0) == {"time/generate": 2.0, "tokens_per_s/generate": 50.0, "time/step": 5.0}


def test_tokens_of_phases_side_by_side_add_up_over_the_time_any_ran():
    record = StepRecord(step=1, start=0.0)
    for start, end in ((0.0, 2.0), (1.0, 4.0)):
        record.add(Phase("eval", "trainer", 1, None, start=start, tokens=100), end)
    assert record.result(4.0)["tokens_per_s/eval"] == 200 / 4


def test_no_rate_without_tokens_or_without_time():
    record = StepRecord(step=1, start=0.0)
    record.add(Phase("a", "trainer", 1, None, start=1.0), 2.0)
    record.add(Phase("b", "trainer", 1, None, start=1.0, tokens=5), 1.0)
    assert not [name for name in record.result(4.0) if name.startswith("tokens_per_s")]
