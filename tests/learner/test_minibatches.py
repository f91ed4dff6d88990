"""Mini-batches: whole groups, each row once."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from skyrl_train.batch import collate
from skyrl_train.learner.minibatches import mini_batches
from skyrl_train.types import Prompt, Trajectory


def a_batch(sizes: list[int]):
    """Groups of the given sizes; each row's first token is its number."""
    made = []
    for group, size in enumerate(sizes):
        for sample in range(size):
            one = Trajectory(prompt=Prompt(uid=str(group), messages=(), env_class="x"), sample=sample, prompt_ids=[1])
            one.append_sampled([len(made)], [-1.0], "stop", 0)
            made.append(one)
    return collate(made, 0)


def rows(batch) -> list[int]:
    return batch.response_ids[:, 0].tolist()


def test_groups_of_unequal_sizes_are_never_cut() -> None:
    cut = [rows(mini) for mini in mini_batches(a_batch([3, 1, 2, 2, 1]), 2)]
    assert cut == [[0, 1, 2, 3], [4, 5, 6, 7], [8]]


def test_more_prompts_than_there_are_give_one_mini_batch() -> None:
    assert [rows(mini) for mini in mini_batches(a_batch([2, 2]), 64)] == [[0, 1, 2, 3]]


def test_group_numbers_with_holes_do_not_matter() -> None:
    batch = a_batch([2, 2, 2])
    batch.group = torch.tensor([4, 4, 7, 7, 31, 31])
    assert [rows(mini) for mini in mini_batches(batch, 1)] == [[0, 1], [2, 3], [4, 5]]


@given(st.lists(st.integers(1, 4), min_size=1, max_size=9), st.integers(1, 5))
def test_each_row_once_in_order_and_never_more_prompts_than_asked(sizes: list[int], prompts: int) -> None:
    cut = list(mini_batches(a_batch(sizes), prompts))
    assert [row for mini in cut for row in rows(mini)] == list(range(sum(sizes)))
    counts = [len(set(mini.group.tolist())) for mini in cut]
    assert counts[:-1] == [prompts] * (len(cut) - 1) and 1 <= counts[-1] <= prompts


def test_policy_shares_go_out_in_order_and_come_back_as_one() -> None:
    import asyncio

    from skyrl_train.learner.policy import Scorer

    class Rows:
        """Two workers that answer with the tokens they were given."""

        size = 2

        async def each(self, method: str, arguments: list[tuple]) -> list[torch.Tensor]:
            assert method == "logprobs" and len(arguments) == 2
            return [share.response_ids.float() for (share,) in arguments]

    batch = a_batch([2, 1])
    assert asyncio.run(Scorer(Rows()).logprobs(batch)).tolist() == [[0.0], [1.0], [2.0]]  # type: ignore[arg-type]
