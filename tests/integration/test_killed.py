"""A run that is killed, at any moment, and goes on, is the run that was never killed: to the bit."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest
import shards
import torch

from .conftest import Run, Spawn, World
from .killing import Moment, kill_and_finish, moments, prompts, samples

A, P = "trainer.algorithm", "trainer.policy"
# A save every other step, so that a kill costs work. An epoch of the 90 prompts is seven steps, so one ends on the way.
BASE = (
    "trainer.train_batch_size=12", "trainer.policy_mini_batch_size=6", "generator.n_samples_per_prompt=2",
    "trainer.max_steps=11", "trainer.ckpt_interval=2", "trainer.eval_interval=5", f"{A}.old_logprobs=learner",
    f"{P}.optimizer_config.scheduler=cosine", f"{P}.optimizer_config.num_warmup_steps=2",
    "trainer.max_ckpts_to_keep=2",
)  # fmt: skip
KL = (f"{A}.use_kl_loss=true", f"{A}.kl_ctrl.type=adaptive", f"{A}.kl_ctrl.horizon=100")
BACKGROUND = ("trainer.ckpt_in_background=true",)


def cases(world: World) -> dict[str, tuple[str, ...]]:
    return {
        "background": BACKGROUND,
        "adaptive kl": KL,
        "critic": (
            f"{A}.advantage_estimator=gae", f"trainer.critic.model.path={world.model}",
            "trainer.critic_mini_batch_size=6", "trainer.critic.optimizer_config.lr=1e-3", *BACKGROUND,
        ),
        "adapter": (f"{P}.model.lora.rank=4", f"{A}.dynamic_sampling.type=filter"),
    }  # fmt: skip


def same(killed: Run, whole: Run) -> None:
    """Metrics, prompts, samples, and the last checkpoint."""
    assert killed.steps == whole.steps
    assert killed.steady() == whole.steady()
    assert prompts(killed) == prompts(whole) and samples(killed) == samples(whole)
    folders = [run.folder.parent / "checkpoints" for run in (killed, whole)]
    kept = [sorted(p.name for p in folder.iterdir()) for folder in folders]
    assert kept[0] == kept[1] == ["global_step_10", "global_step_11", "latest_ckpt_global_step.txt"]
    for part in ("policy", "critic"):
        if (folders[1] / "global_step_11" / part).exists():
            one, other = (shards.tensors(folder / "global_step_11" / part) for folder in folders)
            assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def whole(world: World, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Eleven steps in one go, with checkpoints that are written while it waits."""
    return world.train(tmp_path_factory.mktemp("whole"), *BASE, *KL)


def test_an_undisturbed_run_gives_each_prompt_once_an_epoch(whole: Run) -> None:
    given = prompts(whole)
    for epoch in (given[:7], given[7:]):
        uids = [uid for step in epoch for uid in step]
        assert len(set(uids)) == len(uids) == 12 * len(epoch)
    assert set(given[7]) & {uid for step in given[:7] for uid in step}


def test_killed_while_generating_scoring_updating_saving_and_syncing(
    spawn: Spawn, world: World, whole: Run, tmp_path: Path
) -> None:
    """Four moments of five, and what is written in the background is what is written at once."""
    times = moments(random.Random(seed := time.time_ns()), whole)[:4]
    print("seed", seed, times)  # shown when it fails
    same(kill_and_finish(spawn, world, tmp_path, times, *BASE, *KL, *BACKGROUND), whole)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("case", ["background", "adaptive kl", "critic", "adapter"])
def test_killed_at_five_moments_of_every_kind(spawn: Spawn, world: World, tmp_path: Path, case: str) -> None:
    """Twenty in all."""
    more = (*BASE, *cases(world)[case])
    whole = world.train(tmp_path / "whole", *more)
    times = moments(random.Random(seed := time.time_ns()), whole)
    print("seed", seed, times)
    same(kill_and_finish(spawn, world, tmp_path / "killed", times, *more), whole)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_sharded_workers_killed_with_their_driver_and_one_alone(spawn: Spawn, world: World, tmp_path: Path) -> None:
    """Two ranks over gloo, each with an engine: killed, resumed, equal to the bit to two that were not."""
    more = (*BASE, f"{P}.fsdp_config.fsdp_size=2", "trainer.placement.policy_num_gpus_per_node=2")  # fmt: skip
    whole = kill_and_finish(spawn, world, tmp_path / "whole", [], *more)
    draw = random.Random(seed := time.time_ns())
    phases = ("generate", "update", "checkpoint")
    times = [*moments(draw, whole, phases), Moment("update", 1, 0.01, "rank")]
    print("seed", seed, times)
    same(kill_and_finish(spawn, world, tmp_path / "killed", times, *more), whole)
