"""The real commands, and everything that a run leaves behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import shards
import torch
import yaml

from .conftest import Run, Spawn, World

STARTED = 4 * 4


@pytest.fixture(scope="module")
def finished(world: World, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path, subprocess.CompletedProcess]:
    """Three steps by ``python -m``, with evaluation, checkpoints and an export."""
    folder = tmp_path_factory.mktemp("command")
    more = ["trainer.eval_interval=2", "trainer.eval_before_train=true", "trainer.ckpt_interval=2",
            "trainer.hf_save_interval=3", "trainer.dump_data_batch=true", "trainer.logger=[tensorboard]",
            f"hydra.run.dir={folder}/run"]  # fmt: skip
    command = [sys.executable, "-m", "skyrl_train.entrypoints.main_base", *world.overrides(folder, *more)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=folder)
    assert done.returncode == 0, done.stderr
    return Run(folder / "run"), folder, done


def test_every_step_is_in_the_history_once(finished) -> None:
    run, _, _ = finished
    assert run.steps == [0, 1, 2, 3]
    for line in run.history:
        assert ("eval/all/avg_score" in line) == (line["step"] in (0, 2, 3))
        assert ("policy/loss" in line) == (line["step"] > 0)


def test_every_fate_is_counted_and_every_trajectory_is_written(finished) -> None:
    run, _, _ = finished
    fates = ("finished", "truncated", "filtered", "stale", "failed")
    for line in run.history[1:]:
        counts = {fate: line[f"trajectories/{fate}"] for fate in fates}
        written = run.trajectories(int(line["step"]))
        assert sum(counts.values()) == line["trajectories/started"] == len(written) == STARTED
        assert counts == {fate: sum(t["outcome"] == fate for t in written) for fate in fates}
        rewards = [t["reward"] for t in written]
        assert line["reward/mean"] == pytest.approx(sum(rewards) / len(rewards))
        for t in written:
            assert len(t["response_ids"]) == len(t["loss_mask"]) == len(t["rollout_logprobs"]) == len(t["rewards"])
    assert len(run.trajectories(2, "eval_")) == 10


def test_the_timeline_has_every_phase_of_every_step(finished) -> None:
    run, _, _ = finished
    phases = {(e["step"], e["name"]) for e in run.events if e["event"] == "phase"}
    every = ("generate", "update", "checkpoint", "weight_sync")
    assert {(step, name) for step in (1, 2, 3) for name in every} <= phases
    assert {(step, "eval") for step in (0, 2, 3)} <= phases
    assert (1, "old_logprobs") in phases and (2, "old_logprobs") not in phases  # the engine's are the learner's
    assert [e["event"] for e in run.events if e["event"].startswith("run_")] == ["run_start", "run_end"]


def test_what_the_command_said(finished, world: World) -> None:
    run, folder, done = finished
    assert "step 3/3" in done.stdout and "Traceback" not in done.stderr
    text = (run.folder / "config.yaml").read_text()
    config = yaml.safe_load(text)
    assert config["trainer"]["policy"]["model"]["path"] == str(world.model)
    assert config["trainer"]["micro_train_batch_size_per_gpu"] == 8  # derived, so that the numbers used are there
    assert "trainer.logger=[tensorboard]" in text.splitlines()[0]
    assert list(run.folder.rglob("events.out.tfevents*"))
    assert not (folder / "outputs").exists()


def test_a_batch_can_be_read_back(finished) -> None:
    from safetensors.torch import load_file

    run, _, _ = finished
    batch = load_file(run.folder / "batches" / "step_000002.safetensors")
    assert batch["response_ids"].shape == batch["advantages"].shape == batch["loss_mask"].shape
    assert len(batch["response_ids"]) == STARTED
    written = run.trajectories(2)
    assert batch["rewards"].sum().item() == pytest.approx(sum(t["reward"] for t in written))
    assert torch.equal(batch["old_logprobs"], batch["rollout_logprobs"])


def test_checkpoints_are_where_they_should_be(finished) -> None:
    _, folder, _ = finished
    found = sorted(p.name for p in (folder / "checkpoints").iterdir())
    assert found == ["global_step_2", "global_step_3", "latest_ckpt_global_step.txt"]


def test_the_export_is_the_trained_policy(finished, world: World) -> None:
    """Plain transformers, with no attention of ours, gives the log-probs of the checkpoint's weights."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _, folder, _ = finished
    exported = folder / "exports" / "global_step_3" / "policy"
    model = AutoModelForCausalLM.from_pretrained(exported).eval()
    before = AutoModelForCausalLM.from_pretrained(world.model).eval()
    weights = shards.tensors(folder / "checkpoints" / "global_step_3" / "policy", "model.")
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[name]), name
    assert any(not torch.equal(v, before.state_dict()[n]) for n, v in weights.items())
    tokenizer, original = (AutoTokenizer.from_pretrained(path) for path in (exported, world.model))
    assert tokenizer.encode("3+4") == original.encode("3+4") and tokenizer.chat_template == original.chat_template
    ids = torch.randint(0, len(tokenizer), (2, 9), generator=torch.Generator().manual_seed(0))
    before.load_state_dict(weights)
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, before(ids).logits, atol=1e-5)


def test_main_generate_scores_the_validation_data(spawn: Spawn, world: World, tmp_path: Path) -> None:
    command = spawn(
        f"data.val_data=[{world.data}/validation.parquet]",
        f"trainer.policy.model.path={world.model}",
        "environment.env_class=addition",
        "generator.sampling_params.max_generate_length=24",
        "generator.eval_sampling_params.temperature=1.0",
        "generator.eval_n_samples_per_prompt=4",
        f"hydra.run.dir={tmp_path}/scored",
        entry="main_generate",
    )
    assert command.wait() == 0, command.err.read_text()
    run = Run(tmp_path / "scored")
    written = run.trajectories(0, "eval_")
    assert len(written) == 40 and run.steps == [0]
    line = run.last
    assert line["eval/addition/avg_score"] == pytest.approx(sum(t["reward"] for t in written) / 40)
    groups = [[t["reward"] for t in written if t["prompt"] == uid] for uid in {t["prompt"] for t in written}]
    assert line["eval/all/pass_at_4"] == pytest.approx(sum(max(g) for g in groups) / 10)
    assert line["eval/all/pass_at_1"] <= line["eval/all/pass_at_2"] <= line["eval/all/pass_at_4"]
    assert not (tmp_path / "scored" / "checkpoints").exists()


def test_no_folder_of_the_tests_is_written_into_the_working_directory() -> None:
    assert "ckpts" not in os.listdir(".")
