"""A run that stops and goes on is the run that did not stop."""

from __future__ import annotations

from pathlib import Path

import pytest
import shards
import torch
from transformers import AutoModelForCausalLM

from skyrl_train.errors import CheckpointError

from .conftest import Run, World

SIX = ("trainer.max_steps=6", "trainer.ckpt_interval=1", "trainer.eval_interval=2")
# What a resumed run must bring back: optimizer moments, schedule, data order over an epoch's end, sampling seeds.
FULL = (*SIX, "trainer.policy.optimizer_config.scheduler=cosine", "trainer.policy.optimizer_config.num_warmup_steps=2",
        "trainer.train_batch_size=32", "trainer.policy_mini_batch_size=16")  # fmt: skip


@pytest.fixture(scope="module")
def whole(world: World, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Six steps in one go."""
    return world.train(tmp_path_factory.mktemp("whole"), *FULL)


def test_three_steps_and_three_more_are_six(world: World, whole: Run, tmp_path: Path) -> None:
    world.train(tmp_path, *FULL, "trainer.ckpt_interval=3", "trainer.max_steps=6", name="whole")
    (tmp_path / "checkpoints" / "latest_ckpt_global_step.txt").write_text("3")
    resumed = world.train(tmp_path, *FULL, name="resumed")
    assert resumed.steps == [4, 5, 6]
    assert resumed.steady() == whole.steady()[3:]


def test_the_learners_own_log_probs_are_equal_too(world: World, tmp_path: Path) -> None:
    """With ``old_logprobs=learner`` the check against the engine is made in every step, and nothing is left out."""
    more = ("trainer.algorithm.old_logprobs=learner", "trainer.max_steps=4", "trainer.ckpt_interval=2")
    whole = world.train(tmp_path, *more)
    back = world.train(
        tmp_path, *more, "trainer.resume_mode=from_path", f"trainer.resume_path={tmp_path}/checkpoints/global_step_2",
        name="back",
    )  # fmt: skip
    clocks = ("time", "tokens_per_s/")
    kept = [[{k: v for k, v in line.items() if not k.startswith(clocks)} for line in r.history] for r in (whole, back)]
    assert kept[0][2:] == kept[1] and "mismatch/mean" in kept[1][0]


def test_a_finished_run_has_nothing_left_to_do(world: World, tmp_path: Path) -> None:
    first = world.train(tmp_path, "trainer.max_steps=2", "trainer.ckpt_interval=1")
    before = first.history
    again = world.train(tmp_path, "trainer.max_steps=2", "trainer.ckpt_interval=1")
    assert again.history == before


@pytest.mark.parametrize("last", [1, 4])
def test_a_kill_between_a_steps_checkpoint_and_its_line(world: World, tmp_path: Path, last: int) -> None:
    """The step is done and cannot be done again; its line and its evaluation are made up for."""
    more = (f"trainer.max_steps={last}", "trainer.ckpt_interval=1", "trainer.eval_interval=2")
    run = world.train(tmp_path, *more)
    whole, file = run.steady(), run.folder / "metrics.jsonl"
    file.write_text("".join(line + "\n" for line in file.read_text().splitlines()[:-1]))
    (run.folder / "trajectories" / f"eval_step_{last:06d}.jsonl").unlink()
    assert world.train(tmp_path, *more).steady() == whole
    assert len(run.trajectories(last, "eval_")) == 10
    elsewhere = world.train(tmp_path, *more, name="elsewhere")  # whose history is another's
    assert not (elsewhere.folder / "metrics.jsonl").exists()


def test_more_steps_than_before_go_on(world: World, tmp_path: Path) -> None:
    world.train(tmp_path, "trainer.max_steps=2", "trainer.ckpt_interval=1")
    assert world.train(tmp_path, "trainer.max_steps=4", "trainer.ckpt_interval=1").steps == [1, 2, 3, 4]


def test_resume_mode_none_starts_anew(world: World, tmp_path: Path) -> None:
    more = ("trainer.max_steps=2", "trainer.ckpt_interval=1")
    first = world.train(tmp_path, *more, name="first")
    second = world.train(tmp_path, *more, "trainer.resume_mode=none", name="second")
    assert second.steps == [1, 2] and second.steady() == first.steady()


def test_a_learning_rate_changed_on_the_way_is_taken(world: World, tmp_path: Path) -> None:
    """The advice after a divergence is to lower it and to go on."""
    more = ("trainer.max_steps=4", "trainer.ckpt_interval=2", "trainer.policy.optimizer_config.num_warmup_steps=8")
    world.train(tmp_path, *more)
    (tmp_path / "checkpoints" / "latest_ckpt_global_step.txt").write_text("2")
    lower = world.train(tmp_path, *more, "trainer.policy.optimizer_config.lr=1e-4", name="lower")
    assert [line["policy/lr"] for line in lower.history] == pytest.approx([1e-4 * 4.5 / 8, 1e-4 * 6.5 / 8])


@pytest.mark.parametrize("change", ["trainer.seed=7", "trainer.train_batch_size=8", "data.shuffle=false"])
def test_another_runs_checkpoint_is_refused(world: World, tmp_path: Path, change: str) -> None:
    world.train(tmp_path, "trainer.max_steps=1", "trainer.ckpt_interval=1", name="first")
    with pytest.raises(CheckpointError, match=r"another run|another order") as raised:
        world.train(tmp_path, change, name="second")
    assert change.split("=")[0].rsplit(".")[-1] in str(raised.value)


def test_other_data_is_refused(world: World, tmp_path: Path) -> None:
    world.train(tmp_path, "trainer.max_steps=1", "trainer.ckpt_interval=1", name="first")
    with pytest.raises(CheckpointError, match="training data changed"):
        world.train(tmp_path, f"data.train_data=[{world.data}/validation.parquet]", name="second")


@pytest.mark.parametrize("content", [b"", b"no weights", b"cut"])
def test_a_torn_weights_file_is_refused(world: World, tmp_path: Path, content: bytes) -> None:
    world.train(tmp_path, "trainer.max_steps=1", "trainer.ckpt_interval=1", name="first")
    file = tmp_path / "checkpoints" / "global_step_1" / "policy" / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:5000] if content == b"cut" else content)
    with pytest.raises(CheckpointError, match=r"global_step_1/policy.*not whole"):
        world.train(tmp_path, name="second")


def test_a_missing_from_path_names_what_is_there(world: World, tmp_path: Path) -> None:
    world.train(tmp_path, "trainer.max_steps=1", "trainer.ckpt_interval=1", name="first")
    more = ("trainer.resume_mode=from_path", f"trainer.resume_path={tmp_path}/checkpoints/global_step_9")
    with pytest.raises(CheckpointError, match="global_step_1"):
        world.train(tmp_path, *more, name="second")


def test_a_run_whose_checkpoints_are_elsewhere(world: World, whole: Run, tmp_path: Path) -> None:
    """By way of fsspec: saved while training goes on, exported, resumed; the numbers are those of the run on a disk."""
    far = (f"trainer.ckpt_path=file://{tmp_path}/far/ckpts", f"trainer.export_path=file://{tmp_path}/far/exports",
           "trainer.ckpt_interval=2", "trainer.max_ckpts_to_keep=2", "trainer.hf_save_interval=6",
           "trainer.ckpt_in_background=true")  # fmt: skip
    run = world.train(tmp_path, *FULL, *far)
    assert run.steady() == whole.steady()
    ckpts = tmp_path / "far" / "ckpts"
    assert sorted(p.name for p in ckpts.iterdir()) == ["global_step_4", "global_step_6", "latest_ckpt_global_step.txt"]
    (ckpts / "latest_ckpt_global_step.txt").write_text("4")
    back = world.train(tmp_path, *FULL, *far, name="back")
    assert back.steps == [5, 6] and back.steady() == whole.steady()[4:]
    trained = shards.tensors(ckpts / "global_step_6" / "policy", "model.")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "far" / "exports" / "global_step_6" / "policy")
    assert all(torch.equal(value, trained[name]) for name, value in model.state_dict().items())
