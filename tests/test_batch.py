"""``collate`` and ``TrainBatch``: the example of the docstring, padding, order, groups, files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from skyrl_train.batch import TrainBatch, collate
from skyrl_train.types import Outcome, Prompt, Trajectory

Make = Callable[..., Trajectory]
PAD = 77


def two_turn_game(trajectory: Make) -> Trajectory:
    made = trajectory("a/0", ids=[7], prompt_ids=[1, 2, 3])
    made.append_observed([5])
    made.append_sampled([9], [-0.25], "stop", 0)
    made.reward_turn(1.0)
    return made


def test_the_two_sequences_of_the_docstring(trajectory: Make) -> None:
    batch = collate([two_turn_game(trajectory), trajectory("b/0", ids=[4, 8], prompt_ids=[6])], PAD)
    assert batch.prompt_ids.tolist() == [[1, 2, 3], [PAD, PAD, 6]]
    assert batch.prompt_lengths.tolist() == [3, 1]
    assert batch.response_ids.tolist() == [[7, 5, 9], [4, 8, PAD]]
    assert batch.response_mask.tolist() == [[True, True, True], [True, True, False]]
    assert batch.loss_mask.tolist() == [[True, False, True], [True, True, False]]
    assert batch.rollout_logprobs.tolist() == [[-0.5, 0.0, -0.25], [-0.5, -0.5, 0.0]]
    assert batch.rewards.tolist() == [[0, 0, 1.0], [0, 0, 0]]
    assert batch.group.tolist() == [0, 1]
    types = [batch.response_ids, batch.loss_mask, batch.response_mask, batch.rewards, batch.group]
    assert [t.dtype for t in types] == [torch.int64, torch.bool, torch.bool, torch.float32, torch.int64]
    assert len(batch) == 2
    assert batch.prompt(1) == [6] and batch.response(1) == [4, 8] and batch.response(0) == [7, 5, 9]


def test_samples_stand_together_in_the_order_of_the_prompts_whatever_came_first(trajectory: Make) -> None:
    made = [
        trajectory("z/9", 1),
        trajectory("a/0", 1),
        trajectory("z/9", 0),
        trajectory("m/4", 0),
        trajectory("a/0", 0),
    ]
    for i, t in enumerate(made):
        t.response_ids = [i]
    batch = collate(made, PAD)
    assert batch.response_ids[:, 0].tolist() == [2, 0, 4, 1, 3]
    assert batch.group.tolist() == [0, 0, 1, 1, 2]


def test_what_may_not_be_used_is_left_out(trajectory: Make) -> None:
    made = [
        trajectory("a/0", 0, outcome=Outcome.FAILED, ids=[1] * 50),
        trajectory("a/0", 1, ids=[9]),
        trajectory("b/0", 0, outcome=Outcome.FILTERED),
        trajectory("c/0", 0, outcome=Outcome.TRUNCATED),
        trajectory("d/0", 0, outcome=Outcome.STALE),
    ]
    batch = collate(made, PAD)
    assert len(batch) == 2
    assert batch.response_ids.shape == (2, 1)  # the failed one's length does not widen the batch
    assert batch.group.tolist() == [0, 1]


def test_a_batch_of_nothing_is_refused(trajectory: Make) -> None:
    with pytest.raises(ValueError, match="no usable trajectory"):
        collate([trajectory(outcome=Outcome.FAILED)], PAD)
    with pytest.raises(ValueError, match="no usable trajectory"):
        collate([], PAD)


def test_select_takes_rows_in_the_order_given_and_every_tensor(trajectory: Make) -> None:
    batch = collate([trajectory(f"{n}/0", ids=[i]) for i, n in enumerate("abcd")], PAD)
    batch.advantages = torch.arange(4.0)[:, None]
    some = batch.select([3, 1])
    assert some.response_ids[:, 0].tolist() == [3, 1]
    assert some.group.tolist() == [3, 1]
    assert some.advantages is not None and some.advantages[:, 0].tolist() == [3.0, 1.0]
    assert some.old_logprobs is None
    assert batch.select(torch.tensor([], dtype=torch.long)).response_ids.shape == (0, 1)
    assert batch.to(torch.device("cpu")).response_ids.equal(batch.response_ids)


def test_a_written_batch_reads_back_also_where_two_names_share_a_tensor(trajectory: Make, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    batch = collate([two_turn_game(trajectory), trajectory("b/0")], PAD)
    batch.old_logprobs = batch.rollout_logprobs  # as the trainer does with an embedded engine
    batch.advantages = batch.returns = batch.rewards
    batch.values = torch.zeros(3, 2).T
    path = tmp_path / "batches" / "step_1.safetensors"
    batch.write(path)
    read = load_file(path)
    assert read.keys() == {*TrainBatch.__dataclass_fields__} - {"ref_logprobs", "correction", "baselines", "host"}
    assert all(tensor.equal(getattr(batch, name)) for name, tensor in read.items())


def test_baselines_come_along_for_every_trajectory_or_for_none(trajectory: Make) -> None:
    made = [trajectory("a/0", 0), trajectory("a/0", 1), trajectory("b/0")]
    for one, baseline in zip(made, (0.5, 0.5, -1.0), strict=True):
        one.baseline = baseline
    batch = collate(made, PAD)
    assert batch.baselines is not None and batch.baselines.tolist() == [0.5, 0.5, -1.0]
    made[2].baseline = None
    with pytest.raises(ValueError, match="2 of 3 trajectories have a baseline"):
        collate(made, PAD)


@st.composite
def conversations(draw: st.DrawFn) -> list[Trajectory]:
    made = []
    for uid in draw(st.lists(st.sampled_from("abcde"), min_size=1, max_size=8)):
        prompt = Prompt(uid=uid, messages=(), env_class="x")
        ids = draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
        one = Trajectory(prompt=prompt, sample=len(made), prompt_ids=ids)
        for _ in range(draw(st.integers(1, 3))):
            tokens = draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))
            one.append_sampled(tokens, [-float(t) for t in tokens], "stop", 0)
            one.reward_turn(draw(st.integers(-2, 2)))
            one.append_observed(draw(st.lists(st.integers(1, 9), max_size=3)))
        made.append(one)
    return made


@given(conversations())
def test_every_row_gives_its_trajectory_back(made: list[Trajectory]) -> None:
    batch = collate(made, PAD)
    order = {uid: i for i, uid in enumerate(dict.fromkeys(t.prompt.uid for t in made))}
    rows = sorted(made, key=lambda t: (order[t.prompt.uid], t.sample))
    assert len(batch) == len(rows)
    for i, t in enumerate(rows):
        length = len(t.response_ids)
        assert batch.prompt(i) == t.prompt_ids and batch.response(i) == t.response_ids
        assert batch.loss_mask[i, :length].int().tolist() == t.loss_mask
        assert batch.rollout_logprobs[i, :length].tolist() == t.rollout_logprobs
        assert batch.rewards[i].sum() == t.reward
        assert batch.group[i] == order[t.prompt.uid]
    beyond = ~batch.response_mask
    assert not batch.loss_mask[beyond].any() and not batch.rewards[beyond].any()
    assert (batch.response_ids[beyond] == PAD).all() and not batch.rollout_logprobs[beyond].any()
