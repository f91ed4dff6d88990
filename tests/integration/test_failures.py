"""What goes wrong in a run: envs, weights, numbers. The run goes on, or ends with one clear error."""

from __future__ import annotations

import asyncio
import json
import shutil
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from skyrl_train.config.door import load_config
from skyrl_train.errors import (
    ConfigError,
    DivergedError,
    GenerationError,
    InvariantError,
    MissingPackageError,
    ModelError,
    WeightSyncError,
)
from skyrl_train.trainer import Trainer

from .conftest import Run, Spawn, World

UNRELIABLE = ("environment.env_class=integration.toy_envs:Unreliable", "data.shuffle=false",
              "trainer.train_batch_size=8", "environment.timeout=1")  # fmt: skip
FAULTS = "+environment.skyrl_gym.unreliable"


def test_prompts_whose_env_fails_are_lost_and_the_step_goes_on(world: World, tmp_path: Path) -> None:
    """The first step has rows 0 to 7."""
    faults = {"raises": 1, "hangs": 2, "nan": 4, "foreign": 7}
    run = world.train(tmp_path, *UNRELIABLE, *(f"{FAULTS}.{name}=[{row}]" for name, row in faults.items()))
    assert run.steps == [1, 2, 3]
    first = run.history[0]
    assert (first["trajectories/started"], first["trajectories/failed"], first["trajectories/finished"]) == (32, 16, 16)
    assert (first["prompts/started"], first["prompts/used"], first["prompts/lost"]) == (8, 4, 4)
    assert run.history[1]["trajectories/failed"] == 0
    causes = {t["prompt"]: t["cause"] for t in run.trajectories(1) if t["outcome"] == "failed"}
    said = {name: next(c for uid, c in causes.items() if uid.endswith(f"/{row}")) for name, row in faults.items()}
    assert "KeyError" in said["raises"] and "no such table" in said["raises"]
    assert "EnvTimeoutError" in said["hangs"] and "environment.timeout=1" in said["hangs"]
    assert "reward=nan" in said["nan"] and "not a StepResult" in said["foreign"]
    for t in run.trajectories(1):  # what was asked and answered is there, to play it again
        assert t["prompt_ids"] and t["response_ids"] and t["messages"] and "reward_spec" in t["extras"]


def test_failures_leave_the_others_as_they_were(world: World, tmp_path: Path) -> None:
    """A sample is decided by its seed, not by who fails beside it."""
    whole = world.train(tmp_path, *UNRELIABLE, name="whole")
    broken = world.train(tmp_path, *UNRELIABLE, f"{FAULTS}.raises=[1, 2]", name="broken")
    pairs = zip(whole.trajectories(1), broken.trajectories(1), strict=True)
    assert all(a["response_ids"] == b["response_ids"] for a, b in pairs)


def test_an_evaluation_counts_failures_as_not_passed(world: World, tmp_path: Path) -> None:
    run = world.train(tmp_path, *UNRELIABLE, "trainer.eval_interval=3", f"{FAULTS}.raises=[0, 3]")
    assert run.last["eval/all/failed"] == 2
    written = run.trajectories(3, "eval_")
    assert run.last["eval/all/avg_score"] == sum(t["reward"] for t in written if t["outcome"] != "failed") / 10


def test_when_every_env_fails_the_run_ends_with_the_causes(spawn: Spawn, world: World, tmp_path: Path) -> None:
    arguments = world.overrides(tmp_path, *UNRELIABLE, f"{FAULTS}.raises=all", f"hydra.run.dir={tmp_path}/run")
    command = spawn(*arguments)
    assert command.wait() == 2
    said = command.err.read_text()
    assert "step 1: none of 32 trajectories is usable" in said and "no such table" in said
    assert "Traceback" not in said
    run = Run(tmp_path / "run")
    assert next(e for e in run.events if e["event"] == "run_end")["error"].startswith("GenerationError")


def test_a_lost_step_leaves_the_checkpoints_before_it(world: World, tmp_path: Path) -> None:
    rows = list(range(16, 24))  # the third step's
    with pytest.raises(GenerationError, match="step 3"):
        world.train(tmp_path, *UNRELIABLE, "trainer.ckpt_interval=1", f"{FAULTS}.raises={rows}")
    again = world.train(tmp_path, *UNRELIABLE, "trainer.ckpt_interval=1")
    assert again.steps == [1, 2, 3]


def altered(world: World, folder: Path, change) -> World:
    """A copy of the model whose tensors ``change`` has altered."""
    shutil.copytree(world.model, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return World(data=world.data, model=folder)


def poison(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.0.mlp.down_proj.weight"][3, 3] = float("nan")


def test_a_model_with_nan_in_its_weights_is_refused_before_the_first_step(world: World, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="not finite"):
        altered(world, tmp_path / "sick", poison).train(tmp_path)


def test_a_reference_with_nan_is_named(world: World, tmp_path: Path) -> None:
    sick = altered(world, tmp_path / "sick", poison)
    with pytest.raises(InvariantError, match=r"the reference's log-probs are not finite.*trainer\.ref\.model\.path"):
        world.train(tmp_path, "trainer.algorithm.use_kl_loss=true", f"trainer.ref.model.path={sick.model}")


def nan_loss(world: World, folder: Path) -> tuple[str, ...]:
    """Every loss of the run is NaN: its reference is, and that is only warned of."""
    sick = altered(world, folder / "sick", poison)
    return ("trainer.algorithm.use_kl_loss=true", f"trainer.ref.model.path={sick.model}",
            "trainer.invariants.mode=warn")  # fmt: skip


def test_updates_that_are_not_finite_stop_the_run_with_advice(world: World, tmp_path: Path) -> None:
    with pytest.raises(DivergedError) as raised:
        world.train(tmp_path, *nan_loss(world, tmp_path))
    for part in ("3 updates in a row", "trainer.policy.optimizer_config.lr", "1e-7", "max_grad_norm", "eps_clip"):
        assert part in str(raised.value)
    run = Run(tmp_path / "run")
    assert run.steps == [1]  # two updates were skipped in it, the third is of step 2
    assert run.last["policy/skipped_updates_total"] == 2
    assert run.last["policy/loss"] == "NaN"  # JSON has no such number


def test_skipped_updates_change_nothing_and_are_counted(world: World, tmp_path: Path) -> None:
    more = (*nan_loss(world, tmp_path), "trainer.max_skipped_updates=99", "trainer.hf_save_interval=3")
    run = world.train(tmp_path, *more)
    assert [line["policy/skipped_updates_total"] for line in run.history] == [2, 4, 6]
    before = load_file(world.model / "model.safetensors")
    after = load_file(tmp_path / "exports" / "global_step_3" / "policy" / "model.safetensors")
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_a_learning_rate_that_blows_up_ends_with_advice(spawn: Spawn, world: World, tmp_path: Path) -> None:
    """The first update ruins the weights, and the step has three more."""
    more = ("trainer.policy.optimizer_config.lr=1e38", "trainer.policy_mini_batch_size=1",
            "trainer.update_epochs_per_batch=2", "environment.env_class=integration.toy_envs:Coin")  # fmt: skip
    command = spawn(*world.overrides(tmp_path, *more, f"hydra.run.dir={tmp_path}/run"))
    assert command.wait() == 2
    said = command.err.read_text()
    assert "3 updates in a row" in said and "Lower trainer.policy.optimizer_config.lr" in said
    assert "Traceback" not in said


def test_weights_that_overflow_between_steps_are_the_engines_to_name(world: World, tmp_path: Path) -> None:
    """One update a step, so that the next thing to meet the weights is the engine."""
    more = ("trainer.policy.optimizer_config.lr=1e38", "trainer.policy_mini_batch_size=4",
            "environment.env_class=integration.toy_envs:Coin")  # fmt: skip
    with pytest.raises(GenerationError, match=r"logits are not finite.*optimizer_config\.lr"):
        world.train(tmp_path, *more)
    assert Run(tmp_path / "run").steps == [1]


class Meddling(Trainer):
    """Weights move between sampling and scoring, as if the engine had held older ones."""

    __slots__ = ()

    async def generate(self, step, prompts):
        trajectories = await super().generate(step, prompts)
        worker = self.policy.workers._hosts[0]._object  # type: ignore[attr-defined]
        with torch.no_grad():
            for parameter in worker.model.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(step)))
        return trajectories


def meddle(world: World, folder: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> Run:
    from skyrl_train import build

    monkeypatch.setattr("skyrl_train.trainer.Trainer", Meddling)
    config = load_config(world.overrides(folder, *more))

    async def run() -> None:
        async with AsyncExitStack() as stack:
            trainer = await build.build_trainer(config, folder / "run", stack)
            assert isinstance(trainer, Meddling)
            await trainer.train()

    asyncio.run(run())
    return Run(folder / "run")


def test_stale_weights_in_the_engine_stop_the_run(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InvariantError, match=r"stale weights.*mode=warn"):
        meddle(world, tmp_path, monkeypatch)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_stale_weights_are_found_in_every_step_where_the_learner_scores(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    more = ("trainer.invariants.mode=warn", "trainer.algorithm.old_logprobs=learner")
    with caplog.at_level("WARNING", "skyrl.invariants"):
        run = meddle(world, tmp_path, monkeypatch, *more)
    assert run.steps == [1, 2, 3]
    assert sum("stale weights" in record.message for record in caplog.records) == 3
    assert all(line["mismatch/mean"] > 0.1 for line in run.history)


def test_invariants_that_are_off_say_nothing(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = meddle(world, tmp_path, monkeypatch, "trainer.invariants.mode=off")
    assert run.steps == [1, 2, 3]
    assert not [r for r in caplog.records if r.name == "skyrl.invariants"]
    assert run.history[0]["mismatch/mean"] > 0.1  # measured all the same


def noisy(tensors: dict[str, torch.Tensor]) -> None:
    for tensor in tensors.values():
        tensor.add_(0.02 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1)))


def test_a_reference_from_another_folder_may_differ(world: World, tmp_path: Path) -> None:
    other = altered(world, tmp_path / "other", noisy)
    more = ("trainer.algorithm.use_kl_loss=true", f"trainer.ref.model.path={other.model}")
    run = world.train(tmp_path, *more)
    assert run.history[0]["policy/kl_loss"] > 0.001  # which the policy's own folder would not be allowed


def test_a_reference_that_should_be_the_policy_and_is_not_stops_the_run(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ("trainer.algorithm.use_kl_loss=true", "trainer.algorithm.old_logprobs=learner",
            "trainer.invariants.logprob_gap=100")  # fmt: skip
    with pytest.raises(InvariantError, match="the reference and the policy come from the same folder"):
        meddle(world, tmp_path, monkeypatch, *more)


BROKEN = {  # overrides of a run that never starts: the error's kind, and what it must name
    "no data": (["data.train_data=[nowhere.parquet]"], ValueError, "nowhere.parquet"),
    "no model": (["trainer.policy.model.path=nowhere"], ModelError, "nowhere"),
    "no ref": (["trainer.ref.model.path=nowhere", "trainer.algorithm.use_kl_loss=true"], ModelError, "nowhere"),
    "no env": (["environment.env_class=adition"], ConfigError, "addition"),
    "no env class": (["environment.env_class=integration.toy_envs:Missing"], ConfigError, "Missing"),
    "env settings": (["+environment.skyrl_gym.gues.x=1"], ConfigError, "guess"),
    "prompts too long": (["trainer.max_prompt_length=5"], ValueError, "trainer.max_prompt_length"),
    "batch too big": (["trainer.train_batch_size=92"], ConfigError, "90 prompts"),
    "model field": (["+trainer.policy.model_config_kwargs.hiden_size=3"], ModelError, "hiden_size"),
    "model size": (["+trainer.policy.model_config_kwargs.hidden_size=32"], ModelError, "shape"),
    "template": (["generator.chat_template.name_or_path=lama"], ConfigError, "chatml"),
    "template file": (["generator.chat_template.source=file", "generator.chat_template.name_or_path=no.jinja"],
                      ConfigError, "no.jinja"),
    "logger": (["trainer.logger=my.sinks:Nothing"], ConfigError, "my.sinks:Nothing"),
    "loss": (["trainer.algorithm.policy_loss_type=my.losses:mine"], ConfigError, "my.losses"),
    "checkpoint": (["trainer.resume_mode=from_path", "trainer.resume_path=nowhere"], Exception, "nowhere"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_run_that_cannot_start(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    overrides, kind, named = BROKEN[name]
    with pytest.raises(kind, match=named) as raised:
        world.train(tmp_path, *overrides)
    assert type(raised.value).__module__ == "skyrl_train.errors"
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_tokenizer_that_is_too_large_for_the_model(world: World, tmp_path: Path) -> None:
    mixed = tmp_path / "mixed"
    shutil.copytree(world.model, mixed)
    config = json.loads((mixed / "config.json").read_text())
    tensors = load_file(mixed / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][:100].clone()
    save_file(tensors, mixed / "model.safetensors", {"format": "pt"})
    (mixed / "config.json").write_text(json.dumps(config | {"vocab_size": 100}))
    with pytest.raises(ConfigError, match=r"106 tokens and the model embeds 100"):
        World(data=world.data, model=mixed).train(tmp_path)


def test_a_sink_whose_package_is_missing(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(MissingPackageError, match=r"skyrl-train\[wandb\]"):
        world.train(tmp_path, "trainer.logger=wandb")


def test_an_engine_that_does_not_commit_in_time(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from skyrl_train.roles import PolicyWithEngine

    async def never(self: PolicyWithEngine, version: int) -> None:
        await asyncio.sleep(60)

    monkeypatch.setattr(PolicyWithEngine, "commit_weights", never)
    with pytest.raises(WeightSyncError, match=r"Weight sync timed out.*weight_sync_timeout=0\.2"):
        world.train(tmp_path, "generator.weight_sync_timeout=0.2")
