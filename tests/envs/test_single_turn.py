"""addition, gsm8k, numeric, countdown."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from skyrl_train.errors import ConfigError, EnvError

Make = Callable[..., Any]


@pytest.mark.parametrize(
    ("response", "reward"),
    [
        ("<answer>132</answer>", 1),
        ("7+5+0=12;4+8+1=13;<answer>132</answer>\n", 1),
        ("<answer>132</answer>.", 0),
        ("<answer> 132</answer>", 0),
        ("<answer>0132</answer>", 0),
        ("<answer>132</answer><answer>1</answer>", 0),
        ("<answer>\uff11\uff13\uff12</answer>", 0),
        ("132", 0),
    ],
)
@pytest.mark.parametrize("truth", ["132", 132, 132.0])
def test_addition(make: Make, response: str, reward: float, truth: Any) -> None:
    result = make("addition", truth).step(response)
    assert (result.reward, result.terminated, result.observations) == (reward, True, [])


@pytest.mark.parametrize(
    ("truth", "response", "strict", "flexible"),
    [
        ("18", "so 9*2\n#### 18", 1, 1),
        ("18", "#### 17\n#### 18", 1, 1),
        ("18", "#### 18\n#### 17", 0, 0),
        ("18", "#### $18.00", 1, 1),
        ("18", "####18 dollars", 1, 1),
        ("18", "#### 18. That is 3 more than 15.", 1, 0),
        ("18", "the answer is 18.", 0, 1),
        ("18", "#### 180", 0, 0),
        ("18", "#### 18/2", 0, 0),
        ("18", "#### 18e2", 0, 0),
        ("18", "#### \u0661\u0668", 0, 0),
        ("1234", "#### 1,234", 1, 1),
        ("1,234", "#### 1234", 1, 1),
        ("-5", "#### -5", 1, 1),
        ("-5", "#### \u22125", 1, 1),
        ("-5", "#### 5", 0, 0),
        ("0.5", "#### .50", 1, 1),
        ("worked, 9*2\n#### 18", "#### 18", 1, 1),
        (18, "#### 18", 1, 1),
        ("18", "", 0, 0),
        ("18", "####", 0, 0),
        ("18", "#### eighteen", 0, 0),
        ("18", "####\n18", 1, 1),
    ],
)
def test_gsm8k(make: Make, truth: Any, response: str, strict: float, flexible: float) -> None:
    assert make("gsm8k", truth).step(response).reward == strict
    assert make("gsm8k", truth, {"method": "flexible"}).step(response).reward == flexible
    assert make("numeric", truth).step(response).reward == flexible
    assert make("numeric", truth, {"method": "strict"}).step(response).reward == strict


def test_gsm8k_agrees_with_the_published_labels(make: Make, raw: Callable[[str], Path]) -> None:
    """5,276 completions of real models, each with its label; they end in "A: N" where the env reads "#### N"."""
    count = 0
    for line in (raw("gsm8k") / "example_model_solutions.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        truth = row["ground_truth"].rpartition("A:")[2].strip()
        strict, flexible = make("gsm8k", truth), make("gsm8k", truth, {"method": "flexible"})
        for answer in (value for value in row.values() if isinstance(value, dict)):
            text, label = answer["solution"], answer["is_correct"]
            assert (flexible.step(text).reward == 1) == label, text
            assert (strict.step(text.replace("A:", "####")).reward == 1) == label, text
            count += 1
    assert count == 5276


def test_every_published_gsm8k_answer_is_right(make: Make, raw: Callable[[str], Path]) -> None:
    for line in (raw("gsm8k") / "test.jsonl").read_text(encoding="utf-8").splitlines():
        solution = json.loads(line)["answer"]
        assert make("gsm8k", solution.rpartition("####")[2]).step(solution).reward == 1


PUZZLE = {"numbers": [3, 3, 8, 8], "target": 24}


@pytest.mark.parametrize(
    ("response", "reward"),
    [
        ("<answer>8/(3-8/3)</answer>", 1.0),
        ("hm <answer>8+8</answer> no <answer> 8 / ( 3 - 8 / 3 ) </answer>", 1.0),
        ("<answer>3*8</answer>", 0.1),
        ("<answer>3*8*(8-3-3-1)</answer>", 0.1),
        ("<answer>3+3+8+8</answer>", 0.1),
        ("<answer>24</answer>", 0.1),
        ("<answer>8/(3-3)+8</answer>", 0.1),
        ("<answer>8/(3-8/3) = 24</answer>", 0.0),
        ("<answer>three</answer>", 0.0),
        ("<answer>__import__('os').abort()</answer>", 0.0),
        ("8/(3-8/3)", 0.0),
        ("<answer>9**9**9</answer>", 0.0),
    ],
)
def test_countdown(make: Make, response: str, reward: float) -> None:
    result = make("countdown", PUZZLE, {"format_score": 0.1}).step(response)
    assert result.reward == reward
    assert result.metadata == {"solved": reward == 1, "readable": reward > 0}
    assert make("countdown", json.dumps(PUZZLE)).step(response).reward == float(reward == 1)


def test_every_countdown_solution_is_right(make: Make, raw: Callable[[str], Path]) -> None:
    rows = [json.loads(line) for line in (raw("countdown") / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    for row, other in zip(rows, rows[1:] + rows[:1], strict=True):
        env = make("countdown", {"numbers": row["numbers"], "target": row["target"]})
        assert env.step(f"<answer>{row['expression']}</answer>").reward == 1
        if sorted(other["numbers"]) != sorted(row["numbers"]):
            assert env.step(f"<answer>{other['expression']}</answer>").reward == 0


@pytest.mark.parametrize(
    ("env", "truth"),
    [
        ("addition", None),
        ("addition", ""),
        ("addition", [1]),
        ("addition", True),
        ("gsm8k", "many"),
        ("gsm8k", {"answer": 3}),
        ("countdown", "18"),
        ("countdown", "not json"),
        ("countdown", {"numbers": [1, 2]}),
        ("countdown", {"numbers": [], "target": 3}),
        ("countdown", {"numbers": [1, "2"], "target": 3}),
        ("countdown", {"numbers": [1, 2], "target": 3.5}),
        ("guess", {"secret": 9, "low": 1, "high": 7}),
        ("guess", "5"),
        ("wordle", "two words"),
        ("math", ""),
    ],
)
def test_a_wrong_ground_truth_is_named(make: Make, env: str, truth: Any) -> None:
    with pytest.raises(EnvError, match=r"source/7.*ground_truth"):
        make(env, truth)


@pytest.mark.parametrize(
    ("env", "settings", "message"),
    [
        ("gsm8k", {"methode": "strict"}, r"gsm8k\.methode='strict': .* Did you mean 'method'"),
        ("gsm8k", {"method": "loose"}, r"gsm8k\.method='loose': must be one of strict, flexible"),
        ("numeric", {"method": 3}, r"numeric\.method=3"),
        ("countdown", {"format_score": "high"}, r"countdown\.format_score='high': must be a number"),
        ("countdown", {"format_score": True}, r"format_score=True"),
        ("math", {"timeout": -1}, r"math\.timeout=-1"),
        ("addition", {"x": 1}, r"addition\.x=1: env addition has no such setting\. It has: none"),
        ("wordle", {"words": "/no/such/file"}, r"wordle\.words='/no/such/file': cannot be read"),
    ],
)
def test_a_wrong_setting_is_named(make: Make, env: str, settings: dict[str, Any], message: str) -> None:
    truth = PUZZLE if env == "countdown" else "12" if env != "wordle" else "crane"
    with pytest.raises(ConfigError, match=message):
        make(env, truth, settings)
