"""Every algorithm in whole runs: it trains, its ratios start at 1, it resumes, it is the same in other processes."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from skyrl_train.config.algorithm import ESTIMATORS, KL_ESTIMATORS, LOSSES, REDUCTIONS
from skyrl_train.errors import CheckpointError

from .conftest import TESTS, Run, World

A = "trainer.algorithm"
BRIEF = ("environment.env_class=integration.toy_envs:Brief", "trainer.max_steps=2")
"""Rewards that differ from sample to sample: no group is dead."""
LEARNER = f"{A}.old_logprobs=learner"
DROPPED = f"{A}.off_policy_correction"


def critic(world: World) -> tuple[str, ...]:
    return (f"{A}.advantage_estimator=gae", f"trainer.critic.model.path={world.model}",
            "trainer.critic_mini_batch_size=2", "trainer.critic.optimizer_config.lr=1e-3")  # fmt: skip


@pytest.fixture(scope="module")
def plain(world: World, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """GRPO, with log-probs by the learner."""
    return world.train(tmp_path_factory.mktemp("plain"), *BRIEF, LEARNER)


def is_sound(run: Run, steps: int = 2) -> None:
    assert run.steps == list(range(1, steps + 1))
    for line in run.history:
        assert line["policy/skipped_updates_total"] == 0 and line["policy/updates"] == 2
        assert line["policy/ratio_gap_first"] < 1e-5 and line["policy/grad_norm"] > 0
        assert all(math.isfinite(value) for value in line.values())


@pytest.mark.parametrize("name", ESTIMATORS)
def test_every_estimator(world: World, plain: Run, tmp_path: Path, name: str) -> None:
    more = critic(world) if name == "gae" else (f"{A}.advantage_estimator={name}",)
    run = world.train(tmp_path, *BRIEF, LEARNER, *more)
    is_sound(run)
    assert (run.steady() == plain.steady()) == (name == "grpo")
    assert ("critic/loss" in run.last) == (name == "gae")


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss(world: World, plain: Run, tmp_path: Path, name: str) -> None:
    run = world.train(tmp_path, *BRIEF, LEARNER, f"{A}.policy_loss_type={name}")
    is_sound(run)
    # ratios near 1 are clipped neither once nor twice
    assert (run.last["policy/loss"] == plain.last["policy/loss"]) == (name in ("regular", "dual_clip"))


@pytest.mark.parametrize("name", REDUCTIONS)
def test_every_reduction(world: World, plain: Run, tmp_path: Path, name: str) -> None:
    run = world.train(tmp_path, *BRIEF, LEARNER, f"{A}.loss_reduction={name}")
    is_sound(run)
    # a mini-batch is one micro-batch here, so that the legacy mean is the other one
    assert (run.steady() == plain.steady()) == (name in ("token_mean", "token_mean_legacy"))


@pytest.mark.parametrize("name", KL_ESTIMATORS)
@pytest.mark.parametrize("place", ["loss", "reward"])
def test_every_kl_estimator(world: World, plain: Run, tmp_path: Path, name: str, place: str) -> None:
    switches = {"loss": (f"{A}.use_kl_loss=true",), "reward": (f"{A}.use_kl_in_reward=true",)}[place]
    run = world.train(tmp_path, *BRIEF, LEARNER, *switches, f"{A}.kl_estimator_type={name}", f"{A}.kl_loss_coef=0.1")
    is_sound(run)
    told = {"loss": "policy/kl_loss", "reward": "kl/reward_mean"}[place]
    assert run.last[told] != 0 and run.last["kl/coef"] == 0.1
    assert run.last["policy/loss"] != plain.last["policy/loss"]


CORRECTIONS = {
    "token": ("tis_ratio_type=token",),
    "sequence": ("tis_ratio_type=sequence",),
    "geometric": ("sequence_mask_metric=geometric",),
    "product": ("sequence_mask_metric=product",),
    "outliers": ("outlier_token_is_threshold_low=1e-4", "outlier_token_is_threshold_high=100"),
    "tokens": ("token_mask_is_threshold_low=0.5", "token_mask_is_threshold_high=2"),
}


@pytest.mark.parametrize("name", CORRECTIONS)
def test_where_engine_and_learner_agree_a_correction_corrects_nothing(
    world: World, plain: Run, tmp_path: Path, name: str
) -> None:
    run = world.train(tmp_path, *BRIEF, *(f"{DROPPED}.{option}" for option in CORRECTIONS[name]))
    is_sound(run)
    told = {k: v for k, v in run.history[0].items() if k.startswith("correction/")}
    assert told and run.history[0]["mismatch/mean"] < 1e-5
    assert run.history[0]["policy/loss"] == pytest.approx(plain.history[0]["policy/loss"], rel=1e-3, abs=1e-6)


SAMPLING = ["top_p=0.9", "top_k=5", "min_p=0.05", "repetition_penalty=1.1", "logit_bias={20:1.0}"]


@pytest.mark.parametrize("change", SAMPLING)
def test_ratios_start_at_one_whatever_was_sampled_from(world: World, tmp_path: Path, change: str) -> None:
    hot = "generator.sampling_params.temperature=1.5"
    run = world.train(tmp_path, *BRIEF, hot, f"generator.sampling_params.{change}")
    is_sound(run)
    assert all(line["mismatch/mean"] < 1e-5 for line in run.history)


FILTER = (f"{A}.dynamic_sampling.type=filter", "trainer.train_batch_size=2", "trainer.policy_mini_batch_size=1",
          f"{A}.dynamic_sampling.max_sample_batches=8", "environment.env_class=integration.toy_envs:Half")  # fmt: skip
ADAPTIVE = (f"{A}.use_kl_in_reward=true", f"{A}.kl_ctrl.type=adaptive", f"{A}.kl_ctrl.kl_target=1e-4",
            f"{A}.kl_ctrl.horizon=100", f"{A}.kl_loss_coef=0.1")  # fmt: skip


def test_dynamic_sampling_learns_from_live_groups_alone(world: World, tmp_path: Path) -> None:
    run = world.train(tmp_path, *FILTER)
    assert run.steps == [1, 2, 3]
    for line in run.history:
        assert line["groups/dead_fraction"] == 0 and line["sampling/rounds"] >= 1
        assert line["prompts/used"] == 2 - line["sampling/missing_prompts"]
        assert line["prompts/used"] + line["prompts/filtered"] + line["prompts/lost"] == line["prompts/started"]
    assert max(line["sampling/rounds"] for line in run.history) > 1
    outcomes = set()
    for step, line in enumerate(run.history, 1):
        trajectories = run.trajectories(step)
        assert len(trajectories) == line["trajectories/started"]
        outcomes |= {t["outcome"] for t in trajectories}
    assert outcomes == {"finished", "filtered"}


@pytest.mark.parametrize("case", ["critic", "adaptive", "filter", "replace", "remax"])
def test_a_resumed_run_is_the_run_that_did_not_stop(world: World, tmp_path: Path, case: str) -> None:
    """The critic, the KL coefficient, and the prompts that dynamic sampling took are part of a checkpoint."""
    more = {
        "critic": (*BRIEF, *critic(world)),
        "adaptive": (*BRIEF, *ADAPTIVE),
        "filter": FILTER,
        "replace": (f"{A}.dynamic_sampling.type=replace",),
        "remax": (*BRIEF, f"{A}.advantage_estimator=remax"),
    }[case]
    more = (*more, LEARNER, "trainer.max_steps=4", "trainer.ckpt_interval=2")
    whole = world.train(tmp_path, *more)
    back = world.train(
        tmp_path, *more, "trainer.resume_mode=from_path", f"trainer.resume_path={tmp_path}/checkpoints/global_step_2",
        name="back",
    )  # fmt: skip
    assert back.steps == [3, 4] and back.steady() == whole.steady()[2:]
    if case == "adaptive":
        coefs = [line["kl/coef"] for line in whole.history]
        assert coefs[0] == 0.1 and len(set(coefs)) == 4


def test_a_checkpoint_without_the_critic_is_refused(world: World, tmp_path: Path) -> None:
    world.train(tmp_path, *BRIEF, "trainer.ckpt_interval=1", name="first")
    with pytest.raises(CheckpointError, match=r"another run \(critic: None there"):
        world.train(tmp_path, *BRIEF, *critic(world), name="second")


def test_the_critic_learns_and_is_told_of(world: World, tmp_path: Path) -> None:
    more = ("trainer.max_steps=9", "trainer.train_batch_size=8", "trainer.critic_mini_batch_size=2")
    run = world.train(tmp_path, *BRIEF, *critic(world), *more)
    assert (run.folder / "metrics.jsonl").exists()
    gaps = [abs(line["value/mean"] - line["return/mean"]) for line in run.history[-4:]]
    moved = run.last["return/mean"] - run.history[0]["return/mean"]
    assert max(gaps) < moved / 3, "the policy has moved the returns, and the critic has followed"
    for name in ("critic/loss", "critic/grad_norm", "critic/lr", "critic/clip_fraction", "value/explained_variance"):
        assert all(name in line for line in run.history)


MINE = {
    "advantage_estimator": "doubled", "policy_loss_type": "likelihood", "loss_reduction": "half",
    "kl_estimator_type": "squared", "reward_shaping": "shifted", "off_policy_correction.function": "evens",
    "value_loss_type": "plain",
}  # fmt: skip


def test_all_of_it_in_other_processes(world: World, tmp_path: Path, ray_address: str) -> None:
    """A critic, functions of users' own in every family, dynamic sampling and a changed distribution: with Ray the
    numbers are those of this process."""
    mine = tuple(f"{A}.{key}=integration.toy_losses:{name}" for key, name in MINE.items())
    more = (
        *critic(world), *mine, f"{A}.use_kl_loss=true", "generator.sampling_params.top_p=0.95",
        f"{A}.dynamic_sampling.type=replace", "trainer.max_steps=2",
    )  # fmt: skip
    here = world.train(tmp_path / "here", *more)
    assert here.last["policy/mark"] == 7 and here.last["critic/mark"] == 3 and here.last["correction/mark"] == 5
    assert here.last["reward/shaped_mean"] == pytest.approx(here.last["reward/mean"] + 1)
    arguments = world.overrides(tmp_path / "ray", *more, "trainer.placement.runtime=ray")
    command = [sys.executable, "-m", "skyrl_train.entrypoints.main_base", f"hydra.run.dir={tmp_path}/ray/run"]
    environment = os.environ | {"RAY_ADDRESS": ray_address, "PYTHONPATH": str(TESTS)}
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=280, env=environment)
    assert done.returncode == 0, done.stderr
    assert Run(tmp_path / "ray" / "run").steady() == here.steady()
