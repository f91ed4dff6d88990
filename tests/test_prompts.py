"""``PromptSource``: the steps of a run, and of one that was resumed."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from skyrl_train.data.sampler import PromptSampler
from skyrl_train.prompts import PromptSource
from skyrl_train.types import Prompt


@pytest.fixture
def source(prompt: Callable[..., Prompt]) -> Callable[..., PromptSource]:
    rows = [prompt(f"a/{i}") for i in range(7)]

    def make(epochs: int = 2, max_steps: int | None = None) -> PromptSource:
        return PromptSource(rows, PromptSampler(7, 3, seed=1, epochs=epochs), max_steps)

    return make


def walked(source: PromptSource) -> list[tuple[int, list[str]]]:
    return [(step, [p.uid for p in prompts]) for step, prompts in source.steps()]


def test_steps_are_numbered_from_one_to_the_last(source: Callable[..., PromptSource]) -> None:
    whole = walked(source())
    assert [step for step, _ in whole] == [1, 2, 3, 4]
    assert all(len(uids) == len(set(uids)) == 3 for _, uids in whole)
    first_epoch = whole[0][1] + whole[1][1]
    assert len(set(first_epoch)) == 6


@pytest.mark.parametrize(("max_steps", "last"), [(None, 4), (3, 3), (4, 4), (99, 4), (1, 1)])
def test_the_run_ends_with_the_epochs_or_with_max_steps(
    source: Callable[..., PromptSource], max_steps: int | None, last: int
) -> None:
    one = source(max_steps=max_steps)
    assert one.total_steps == last
    assert [step for step, _ in walked(one)] == list(range(1, last + 1))
    assert one.step == one.total_steps == last
    assert walked(one) == []


def test_a_step_counts_as_taken_while_it_runs(source: Callable[..., PromptSource]) -> None:
    one = source()
    assert one.step == 0
    for step, _ in one.steps():
        assert one.step == step
        assert one.total_steps == 4


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_resumed_run_goes_on_with_the_next_step(source: Callable[..., PromptSource], stop: int) -> None:
    whole, first, second = walked(source()), source(), source()
    for step, _ in first.steps():
        if step == stop:
            break
    second.sampler.load_state_dict(first.sampler.state_dict())
    assert second.step == stop and second.total_steps == 4
    assert walked(second) == whole[stop:]


def test_a_run_whose_max_steps_was_raised_goes_on(source: Callable[..., PromptSource]) -> None:
    first, second = source(max_steps=2), source(max_steps=3)
    whole = walked(source())
    assert walked(first) == whole[:2]
    second.sampler.load_state_dict(first.sampler.state_dict())
    assert walked(second) == whole[2:3]


class TestMore:
    def test_further_prompts_are_those_that_come_next(self, source: Callable[..., PromptSource]) -> None:
        whole, one = walked(source()), source()
        _, prompts = next(one.steps())
        taken = {p.uid for p in prompts}
        assert [p.uid for p in one.more(taken)] == whole[1][1]
        assert one.step == 1 and one.total_steps == 4

    def test_the_number_of_steps_stays_and_further_epochs_are_walked(self, source: Callable[..., PromptSource]) -> None:
        one = source()
        seen = []
        for step, prompts in one.steps():
            seen.append(step)
            one.more({p.uid for p in prompts})
        assert seen == [1, 2, 3, 4] and one.sampler.epoch == 3

    def test_no_prompt_twice_in_a_step_and_none_when_all_were_taken(self, source: Callable[..., PromptSource]) -> None:
        one = source()
        _, prompts = next(one.steps())
        taken = [p.uid for p in prompts]
        while more := one.more(taken):
            taken += [p.uid for p in more]
        assert len(taken) == len(set(taken)) == 7

    def test_a_resumed_run_goes_on_behind_them(self, source: Callable[..., PromptSource]) -> None:
        def run(one: PromptSource, until: int = 99) -> list[list[str]]:
            found = []
            for step, prompts in one.steps():
                more = one.more([p.uid for p in prompts]) if step % 2 else []
                found.append([p.uid for p in (*prompts, *more)])
                if step == until:
                    break
            return found

        whole, first, second = run(source()), source(), source()
        before = run(first, until=2)
        second.sampler.load_state_dict(first.sampler.state_dict())
        assert before + run(second) == whole and len(whole) == 4
