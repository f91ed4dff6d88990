"""``Trajectory``: the two-turn game of its docstring, and what it refuses."""

from __future__ import annotations

import pytest

from skyrl_train.types import Outcome, Prompt, Trajectory

PROMPT = Prompt(uid="guess/0", messages=({"role": "user", "content": "guess 1..10"},), env_class="guess")


def game() -> Trajectory:
    made = Trajectory(prompt=PROMPT, sample=0, prompt_ids=[1, 2, 3, 4])
    made.append_sampled([7, 99], [-0.9, -0.01], "stop", 3)
    made.reward_turn(0.0)
    made.append_observed([1, 50, 99, 4])
    made.append_sampled([9, 99], [-0.4, -0.02], "stop", 3)
    made.reward_turn(1.0)
    return made


def test_the_game_of_the_docstring_token_by_token() -> None:
    made = game()
    assert made.response_ids == [7, 99, 1, 50, 99, 4, 9, 99]
    assert made.loss_mask == [1, 1, 0, 0, 0, 0, 1, 1]
    assert made.rollout_logprobs == [-0.9, -0.01, 0.0, 0.0, 0.0, 0.0, -0.4, -0.02]
    assert made.rewards == [0, 0, 0, 0, 0, 0, 0, 1.0]
    assert [(t.start, t.end, t.weight_version) for t in made.turns] == [(0, 2, 3), (6, 8, 3)]
    assert made.reward == 1.0
    assert made.sampled == 4


def test_a_turns_reward_stays_on_that_turn_whatever_follows() -> None:
    made = Trajectory(prompt=PROMPT, sample=0)
    made.append_sampled([7, 99], [-1.0, -1.0], "stop", 0)
    made.append_observed([5, 5])
    made.reward_turn(0.25)
    made.reward_turn(0.5)
    assert made.rewards == [0, 0.75, 0, 0]
    assert made.turns[0].reward == 0.75


def test_a_sampled_token_without_its_logprob_is_refused_and_nothing_is_added() -> None:
    made = Trajectory(prompt=PROMPT, sample=0)
    with pytest.raises(ValueError, match="2 sampled tokens with 1 log-probs"):
        made.append_sampled([7, 8], [-1.0], "stop", 0)
    assert made.response_ids == [] and made.turns == []


def test_what_is_appended_is_copied() -> None:
    ids = [7, 8]
    made = Trajectory(prompt=PROMPT, sample=0)
    made.append_sampled(ids, [-1.0, -1.0], "stop", 0)
    made.append_observed([9])
    assert ids == [7, 8]


@pytest.mark.parametrize(
    ("outcome", "usable"),
    [
        (Outcome.FINISHED, True),
        (Outcome.TRUNCATED, True),
        (Outcome.FILTERED, False),
        (Outcome.STALE, False),
        (Outcome.FAILED, False),
    ],
)
def test_only_finished_and_truncated_trajectories_enter_a_batch(outcome: Outcome, usable: bool) -> None:
    made = game()
    made.outcome = outcome
    assert made.usable is usable
