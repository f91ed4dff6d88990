from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from skyrl_train.data.truth import decode, encode
from skyrl_train.errors import ConfigError, EnvError

Make = Callable[..., Any]
reasoning_gym = pytest.importorskip("reasoning_gym")


def entry_of(task: str, index: int = 0) -> dict[str, Any]:
    """An entry as a row stores it."""
    entry = reasoning_gym.create_dataset(task, size=index + 1, seed=5)[index]
    return decode(encode({key: entry[key] for key in ("question", "answer", "metadata")}))


@pytest.mark.parametrize(
    "task", ["chain_sum", "countdown", "letter_counting", "polynomial_equations", "spell_backward"]
)
def test_the_package_scores(make: Make, task: str) -> None:
    entry = entry_of(task)
    env = make(f"reasoning_gym:{task}", entry)
    right = env.step(f"so <answer>{entry['answer']}</answer>")
    assert (right.reward, right.terminated) == (1.0, True)
    assert env.step(str(entry["answer"])).reward == 1  # a response without a tag is the answer
    assert env.step("<answer>nonsense</answer>").reward < 0.5
    assert make("reasoning_gym", encode(entry), task=task).step(f"<answer>{entry['answer']}</answer>").reward == 1


def test_an_answer_that_hangs_the_scoring_is_counted(make: Make) -> None:
    entry = entry_of("countdown")
    env = make("reasoning_gym:countdown", entry, {"timeout": 0.5})
    result = env.step("<answer>9**9**9**9**9</answer>")
    assert result.reward == 0 and (result.metadata["timed_out"] or result.metadata["failed"])
    again = make("reasoning_gym:countdown", entry, {"timeout": 20.0})
    assert again.step(f"<answer>{entry['answer']}</answer>").reward == 1


@pytest.mark.parametrize(("name", "near"), [("reasoning_gym:chain_sums", "chain_sum"), ("reasoning_gym", "<task>")])
def test_an_unknown_task_is_named(make: Make, name: str, near: str) -> None:
    with pytest.raises(ConfigError, match=near):
        make(name, {"metadata": {}})


@pytest.mark.parametrize("truth", ["18", {"answer": "18"}, {"metadata": 3}])
def test_a_row_that_is_no_entry_is_named(make: Make, truth: Any) -> None:
    with pytest.raises(EnvError, match="ground_truth"):
        make("reasoning_gym:chain_sum", truth)
