from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from skyrl_train.errors import EnvError

Make = Callable[..., Any]


@pytest.mark.parametrize(
    ("truth", "response", "reward"),
    [
        (r"\frac{1}{2}", r"so \boxed{0.5}", 1),
        (r"\frac{1}{2}", r"so \boxed{\dfrac12}", 1),
        (r"\frac{1}{2}", r"so \boxed{0.4}", 0),
        ("0.5", r"\boxed{\frac{2}{4}}", 1),
        (r"\boxed{7}", r"\boxed{7}", 1),
        ("7", r"\boxed{6} no \boxed{7}", 1),
        ("7", r"\boxed{7} no \boxed{6}", 0),
        ("142", r"\boxed{142.0}", 1),
        (142, r"\boxed{142}", 1),
        ("x^2-1", r"\boxed{(x-1)(x+1)}", 1),
        (r"\left( 3, \frac{\pi}{2} \right)", r"\boxed{(3, \pi/2)}", 1),
        (r"\left( 3, \frac{\pi}{2} \right)", r"\boxed{(\pi/2, 3)}", 0),
        (r"\text{Evelyn}", r"\boxed{\text{Evelyn}}", 1),
        ("2", "The answer is $2$.", 1),
        ("2", "The answer is 2", 1),
        ("2", "The answer is 3", 0),
        ("2", "I do not know", 0),
        ("2", r"\boxed{}", 0),
    ],
)
def test_math(make: Make, truth: Any, response: str, reward: float) -> None:
    result = make("math", truth).step(response)
    assert (result.reward, result.terminated) == (reward, True)


def test_boxed_only(make: Make) -> None:
    env = make("math", "2", {"method": "boxed"})
    assert env.step("The answer is $2$.").reward == 0
    assert env.step(r"\boxed{\sqrt{4}}").reward == 1


def test_the_published_solutions_are_right_and_other_answers_are_not(make: Make, raw: Callable[[str], Path]) -> None:
    rows = json.loads((raw("math") / "math500_test.json").read_text(encoding="utf-8"))[:150]
    for row, other in zip(rows, rows[1:] + rows[:1], strict=True):
        env = make("math", row["answer"])
        assert env.step(row["solution"]).reward == 1, row["answer"]
        assert env.step(f"The answer is ${row['answer']}$.").reward == 1, row["answer"]
        if other["answer"].removeprefix("x=") != row["answer"]:
            assert env.step(rf"\boxed{{ {other['answer']} }}").reward == 0, (row["answer"], other["answer"])


def test_an_answer_that_cannot_be_worked_out_in_time_is_counted(make: Make) -> None:
    env = make("math", "2", {"timeout": 0.5})
    env.step(r"\boxed{\sqrt{4}}")  # a helper is there
    start = time.monotonic()
    result = env.step(r"\boxed{100000000!}")
    assert time.monotonic() - start < 5
    assert result.reward == 0 and result.metadata["timed_out"]
    assert env.step(r"\boxed{\sqrt{4}}").reward == 1


def test_a_ground_truth_that_is_no_mathematics_is_named(make: Make) -> None:
    with pytest.raises(EnvError, match=r"source/7.*cannot read the ground truth"):
        make("math", r"\boxed{ }").step(r"\boxed{1}")
