"""Whole runs that train an adapter."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from skyrl_train import build
from skyrl_train.config.door import load_config

from .conftest import Run, World

LORA = ("trainer.policy.model.lora.rank=8", "trainer.policy.model.lora.alpha=16",
        "trainer.policy.optimizer_config.lr=3e-3", "environment.env_class=integration.toy_envs:Brief")  # fmt: skip
KL = ("trainer.algorithm.use_kl_loss=true", "trainer.algorithm.kl_loss_coef=0.01")


@pytest.fixture(scope="module")
def run(world: World, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Four steps with a KL term, a checkpoint each, and an export at the end."""
    folder = tmp_path_factory.mktemp("adapter")
    more = ("trainer.max_steps=4", "trainer.ckpt_interval=1", "trainer.hf_save_interval=4")
    return world.train(folder, *LORA, *KL, *more, "trainer.algorithm.old_logprobs=learner")


def test_engine_learner_and_reference_agree_in_every_step(run: Run) -> None:
    assert run.steps == [1, 2, 3, 4]
    assert all(line["mismatch/mean"] < 1e-4 and line["policy/ratio_gap_first"] < 1e-4 for line in run.history)
    assert all(line["policy/grad_norm"] > 0 for line in run.history)
    assert run.history[0]["policy/kl_loss"] < 1e-3 < run.last["policy/kl_loss"]


def test_no_second_model_is_loaded_for_the_reference(world: World, tmp_path: Path, monkeypatch) -> None:
    """The KL term of a run that may not load a reference is that of one that does."""
    from skyrl_train.learner import worker
    from skyrl_train.runtime.site import LocalSite

    held = world.train(tmp_path, *LORA, *KL, name="held")
    with monkeypatch.context() as patch:
        patch.setattr(worker, "policy_holds_reference", lambda config: False)
        apart = world.train(tmp_path, *LORA, *KL, name="apart")
    assert held.steady() == apart.steady()
    loaded: list[str] = []
    start = LocalSite.workers

    async def watch(site, role, *args, **kwargs):
        loaded.append(role)
        return await start(site, role, *args, **kwargs)

    monkeypatch.setattr(LocalSite, "workers", watch)
    world.train(tmp_path, *LORA, *KL, "trainer.max_steps=1", name="watched")
    assert loaded == ["policy"]


def test_a_resumed_run_is_the_run_that_did_not_stop(world: World, run: Run) -> None:
    folder = run.folder.parent
    (folder / "checkpoints" / "latest_ckpt_global_step.txt").write_text("2")
    more = ("trainer.max_steps=4", "trainer.ckpt_interval=1", "trainer.algorithm.old_logprobs=learner")
    back = world.train(folder, *LORA, *KL, *more, name="back")
    assert back.steps == [3, 4] and back.steady() == run.steady()[2:]


def test_exports_load_anywhere(world: World, run: Run, tmp_path: Path) -> None:
    exported = run.folder.parent / "exports" / "global_step_4"
    described = json.loads((exported / "policy_adapter" / "adapter_config.json").read_text())
    assert described["r"] == 8 and described["base_model_name_or_path"] == str(world.model)
    again = World(data=world.data, model=exported / "policy").train(tmp_path, "trainer.max_steps=1")
    assert again.history[0]["mismatch/mean"] < 1e-4


def test_it_learns(world: World, tmp_path: Path) -> None:
    history = world.train(tmp_path, *LORA, "trainer.max_steps=20", "trainer.train_batch_size=8").history
    rewards = [line["reward/mean"] for line in history]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.2, rewards


def test_a_wrong_target_ends_the_run_before_the_first_step(world: World, tmp_path: Path) -> None:
    from skyrl_train.errors import ConfigError

    config = load_config(world.overrides(tmp_path, *LORA, "trainer.policy.model.lora.target_modules=[q_prj]"))
    with pytest.raises(ConfigError, match="no module 'q_prj'"):
        build.train(config, tmp_path / "run")
