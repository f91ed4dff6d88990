"""Dynamic sampling: which groups are left out, what is sampled in their place, and that every trajectory has a fate."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skyrl_train.config.door import load_config
from skyrl_train.data.sampler import PromptSampler
from skyrl_train.engines.base import Request
from skyrl_train.envs.base import Env, StepResult
from skyrl_train.errors import GenerationError
from skyrl_train.generator.generator import fate_metrics
from skyrl_train.prompts import PromptSource
from skyrl_train.rounds import Generated, Rounds
from skyrl_train.types import Outcome, Prompt

KINDS = ("mixed", "easy", "hard")


def first_is_good(request: Request) -> str:
    """A policy whose first sample of each prompt is good and whose others are bad."""
    return "good" if (request.session or "").endswith("/0") else "bad"


class Course(Env):
    """easy: always 1. hard: always 0. near: almost 1. broken: fails. mixed: 1 for a good answer."""

    def step(self, response: str) -> StepResult:
        kind = self.prompt.messages[0]["content"].split()[0]
        if kind == "broken":
            raise RuntimeError("no such place")
        rewards = {"easy": 1.0, "hard": 0.0, "near": 1.0 + 1e-8 * len(response)}
        return StepResult(reward=rewards.get(kind, float(response == "good")), terminated=True)


@pytest.fixture(scope="session")
def play(rig: Any, prompt: Callable[..., Prompt]) -> Callable[..., Any]:
    """``play(["easy", "mixed"], "filter", size=2)``: rounds over these prompts in their order, two samples each."""

    def make(kinds: list[str], how: str | None, *, size: int = 2, seed: int = 0, **options: Any) -> Any:
        game = rig(first_is_good, lambda p: Course(p, {}), n_samples_per_prompt=2)
        section = "trainer.algorithm.dynamic_sampling"
        extra = [f"{section}.{name}={value}" for name, value in (({"type": how} if how else {}) | options).items()]
        config = load_config(["trainer.policy.model.path=x", f"trainer.train_batch_size={size}",
                              f"trainer.policy_mini_batch_size={size}", f"trainer.seed={seed}", *extra])  # fmt: skip
        prompts = [prompt(f"{kind}/{i}", text=f"{kind} {i}") for i, kind in enumerate(kinds)]
        source = PromptSource(prompts, PromptSampler(len(prompts), size, seed=seed, shuffle=False, epochs=9), None)
        return Rounds(game.generator, source, config), source

    return make


def step(made: Any) -> Generated:
    """The next step."""
    rounds, source = made
    number, prompts = next(source.steps())
    return asyncio.run(rounds.generate(number, prompts))


def uids(trajectories: Any) -> list[str]:
    """Prompts in the order of their first trajectory."""
    return list(dict.fromkeys(t.prompt.uid for t in trajectories))


def test_without_it_one_round_and_dead_groups_stay(play: Any) -> None:
    made = step(play(["easy", "mixed", "hard"], None))
    assert uids(made.learned) == ["easy/0", "mixed/1"] and len(made.started) == 4 and made.metrics == {}


class TestFilter:
    def test_further_prompts_fill_the_batch(self, play: Any) -> None:
        made = step(play(["easy", "mixed", "hard", "hard", "mixed", "mixed", "easy", "easy"], "filter"))
        # round 1: one live group of two; round 2: none; round 3: two, of which one is needed
        assert uids(made.learned) == ["mixed/1", "mixed/4"]
        assert all(t.usable for t in made.learned) and len(made.started) == 12
        causes = Counter(t.cause for t in made.started if t.outcome is Outcome.FILTERED)
        assert causes == {"all rewards of its group are equal": 6, "the step had its 2 prompts already": 2}
        assert made.metrics == {
            "sampling/rounds": 3, "sampling/dead_prompts": 3, "sampling/surplus_prompts": 1,
            "sampling/missing_prompts": 0,
            "sampling/reward_mean": pytest.approx((2 + 1 + 0 + 0 + 1 + 1) / 12),
        }  # fmt: skip
        fates = fate_metrics(made.started)
        assert (fates["prompts/used"], fates["prompts/filtered"], fates["prompts/lost"]) == (2, 4, 0)

    def test_the_next_step_goes_on_behind_the_prompts_taken(self, play: Any) -> None:
        made = play(["easy", "mixed", "mixed", "easy", "mixed", "mixed", "easy", "hard"], "filter")
        first, second = step(made), step(made)
        assert uids(first.started) == ["easy/0", "mixed/1", "mixed/2", "easy/3"]
        assert uids(second.started) == ["mixed/4", "mixed/5"]
        assert made[1].step == 2

    def test_it_goes_on_short_after_the_last_round(self, play: Any) -> None:
        made = step(play(["easy", "mixed", "hard", "hard", "mixed", "mixed"], "filter", max_sample_batches=2))
        assert uids(made.learned) == ["mixed/1"]
        assert made.metrics["sampling/rounds"] == 2 and made.metrics["sampling/missing_prompts"] == 1

    def test_nothing_to_learn_from_is_an_error_with_advice(self, play: Any) -> None:
        with pytest.raises(GenerationError, match=r"step 1: not one of the groups in 2 rounds.*too easy or too hard"):
            step(play(["easy"] * 4 + ["mixed"] * 4, "filter", max_sample_batches=2))

    def test_each_prompt_at_most_once_in_a_step_however_small_the_data(self, play: Any) -> None:
        made = step(play(["easy", "mixed", "hard", "hard"], "filter", max_sample_batches=-1))
        assert uids(made.started) == ["easy/0", "mixed/1", "hard/2", "hard/3"]
        assert Counter(t.prompt.uid for t in made.started).most_common(1)[0][1] == 2
        assert uids(made.learned) == ["mixed/1"] and made.metrics["sampling/missing_prompts"] == 1

    def test_failures_count_as_lost_and_are_replaced(self, play: Any) -> None:
        made = step(play(["broken", "mixed", "mixed", "easy"], "filter"))
        assert uids(made.learned) == ["mixed/1", "mixed/2"]
        fates = fate_metrics(made.started)
        assert (fates["prompts/used"], fates["prompts/filtered"], fates["prompts/lost"]) == (2, 1, 1)
        assert made.metrics["sampling/dead_prompts"] == 1

    def test_rewards_within_the_tolerance_are_equal(self, play: Any) -> None:
        made = step(play(["near", "mixed", "mixed", "near"], "filter"))
        assert uids(made.learned) == ["mixed/1", "mixed/2"]


class TestReplace:
    def test_copies_of_live_groups_take_the_place_of_dead_ones(self, play: Any) -> None:
        made = step(play(["easy", "mixed", "mixed", "hard"], "replace", size=4))
        names = uids(made.learned)
        assert names[:2] == ["mixed/1", "mixed/2"]
        assert sorted(name.split("#")[0] for name in names[2:]) == ["mixed/1", "mixed/2"]  # each once
        assert len(made.learned) == 8 and len(made.started) == 8
        by_name = {name: [t for t in made.learned if t.prompt.uid == name] for name in names}
        for name, group in by_name.items():
            original = by_name[name.split("#")[0]]
            assert [t.response_ids for t in group] == [t.response_ids for t in original]
        causes = {t.cause for t in made.started if t.outcome is Outcome.FILTERED}
        assert all("takes its place" in str(cause) for cause in causes) and len(causes) == 2
        assert made.metrics["sampling/copied_prompts"] == 2 and made.metrics["sampling/missing_prompts"] == 0

    def test_a_round_of_too_few_live_groups_is_thrown_away(self, play: Any) -> None:
        kinds = ["mixed", "easy", "easy", "hard", "mixed", "mixed", "mixed", "easy"]
        made = step(play(kinds, "replace", size=4))
        # a quarter is not above 0.3; three quarters are
        assert made.metrics["sampling/rounds"] == 2
        assert uids(made.learned)[:3] == ["mixed/4", "mixed/5", "mixed/6"]
        assert [t.cause for t in made.started if t.prompt.uid == "mixed/0"] == [
            "only 1 of 4 groups had unequal rewards"
        ] * 2

    def test_the_last_round_is_taken_as_it_is(self, play: Any) -> None:
        made = step(play(["mixed", "easy", "easy", "hard"], "replace", size=4, max_sample_batches=1))
        assert [name.split("#")[0] for name in uids(made.learned)] == ["mixed/0"] * 4
        assert len(set(uids(made.learned))) == 4  # groups of their own

    def test_none_alive_is_an_error(self, play: Any) -> None:
        with pytest.raises(GenerationError, match="not one of the groups in 3 rounds"):
            step(play(["easy"] * 9, "replace", size=3, max_sample_batches=3))

    def test_which_ones_are_copied_follows_from_seed_and_step(self, play: Any) -> None:
        kinds = ["mixed"] * 5 + ["easy"]

        def copied(seed: int) -> str:
            return uids(step(play(kinds, "replace", size=6, seed=seed)).learned)[-1]

        assert copied(3) == copied(3)
        assert len({copied(seed) for seed in range(8)}) > 1


@settings(max_examples=25, deadline=None)
@given(
    kinds=st.lists(st.sampled_from(KINDS), min_size=4, max_size=14),
    how=st.sampled_from(["filter", "replace"]),
    size=st.integers(1, 4),
    bound=st.sampled_from([1, 2, 5]),
)
def test_whatever_the_data_every_trajectory_has_a_fate(play: Any, kinds, how, size, bound) -> None:
    made = play(kinds, how, size=size, max_sample_batches=bound)
    try:
        sampled = step(made)
    except GenerationError:
        return
    learned = {(t.prompt.uid, t.sample) for t in sampled.learned}
    for trajectory in sampled.started:
        used = (trajectory.prompt.uid, trajectory.sample) in learned
        assert used == (trajectory.outcome is Outcome.FINISHED)
        assert used or trajectory.cause
    groups = Counter(t.prompt.uid for t in sampled.learned)
    assert set(groups.values()) == {2} and len(groups) == size - sampled.metrics["sampling/missing_prompts"]
    fates = fate_metrics(sampled.started)
    assert fates["prompts/started"] == fates["prompts/used"] + fates["prompts/filtered"] + fates["prompts/lost"]
    assert all(max(t.reward for t in g) > min(t.reward for t in g) for g in _groups(sampled.learned))


def _groups(trajectories: Any) -> list[list[Any]]:
    found: dict[str, list[Any]] = {}
    for trajectory in trajectories:
        found.setdefault(trajectory.prompt.uid, []).append(trajectory)
    return list(found.values())
