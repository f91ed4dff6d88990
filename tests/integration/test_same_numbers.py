"""The same command and seed give the same numbers, wherever it runs and however long its envs take."""

from __future__ import annotations

from pathlib import Path

import pytest

from .conftest import Run, Spawn, World

SLOW = ("environment.env_class=integration.toy_envs:Slow",)


def tokens(run: Run) -> list[list[int]]:
    return [t["response_ids"] for step in run.steps for t in run.trajectories(step)]


def test_one_seed_is_one_history_and_another_is_another(world: World, tmp_path: Path) -> None:
    first, second, other = (
        world.train(tmp_path, f"trainer.seed={seed}", "trainer.eval_interval=1", name=name)
        for name, seed in (("a", 5), ("b", 5), ("c", 6))
    )
    assert first.history != second.history  # the clocks
    assert first.steady() == second.steady() and tokens(first) == tokens(second)
    assert first.steady() != other.steady() and tokens(first) != tokens(other)


def test_ray_gives_the_numbers_of_this_process(spawn: Spawn, world: World, tmp_path: Path, ray_address: str) -> None:
    more = ("trainer.algorithm.use_kl_loss=true", "trainer.eval_interval=3", "trainer.ckpt_interval=2",
            "trainer.hf_save_interval=3")  # fmt: skip
    here = world.train(tmp_path / "here", *more)
    arguments = world.overrides(tmp_path / "ray", *more, "trainer.placement.runtime=ray")
    command = spawn(*arguments, f"hydra.run.dir={tmp_path}/ray/run", RAY_ADDRESS=ray_address)
    assert command.wait(280) == 0, command.err.read_text()
    there = Run(tmp_path / "ray" / "run")
    assert there.steady() == here.steady() and tokens(there) == tokens(here)
    weights = [(tmp_path / n / "exports/global_step_3/policy/model.safetensors").read_bytes() for n in ("here", "ray")]
    assert weights[0] == weights[1]


def test_the_time_that_envs_take_decides_nothing(world: World, tmp_path: Path) -> None:
    runs = [world.train(tmp_path, *SLOW, name=str(i)) for i in range(3)]
    fast = world.train(tmp_path, *SLOW, "+environment.skyrl_gym.slow.longest=0", name="fast")
    assert all(run.steady() == fast.steady() and tokens(run) == tokens(fast) for run in runs)


def test_turns_of_random_length_decide_nothing(world: World, tmp_path: Path) -> None:
    """Several turns: which requests decode together would depend on who answers first."""
    more = ("environment.env_class=integration.toy_envs:Repeated", "generator.max_turns=3",
            "generator.max_input_length=200", "trainer.max_steps=2")  # fmt: skip
    first, second = (world.train(tmp_path, *more, name=name) for name in ("a", "b"))
    assert first.history[0]["response/turns_mean"] == 3
    assert first.steady() == second.steady() and tokens(first) == tokens(second)


def test_without_waiting_it_still_runs(world: World, tmp_path: Path) -> None:
    run = world.train(tmp_path, *SLOW, "generator.deterministic=false")
    assert run.steps == [1, 2, 3]


def test_packed_and_padded_agree(world: World, tmp_path: Path) -> None:
    """Equal to rounding: the gradients are sums in another order."""
    more = ("trainer.algorithm.use_kl_loss=true", "trainer.policy.optimizer_config.lr=1e-4",
            "trainer.algorithm.old_logprobs=learner")  # fmt: skip
    packed, padded = (
        world.train(tmp_path, *more, f"trainer.use_sample_packing={value}", name=value) for value in ("true", "false")
    )
    assert tokens(packed) == tokens(padded)
    for a, b in zip(packed.steady(), padded.steady(), strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-5)


def test_micro_batches_change_nothing_but_rounding(world: World, tmp_path: Path) -> None:
    sizes = ("1", "2", "8")
    runs = [
        world.train(
            tmp_path, f"trainer.micro_train_batch_size_per_gpu={n}", f"trainer.micro_forward_batch_size_per_gpu={n}",
            "trainer.policy.optimizer_config.lr=1e-4", name=n,
        )
        for n in sizes
    ]  # fmt: skip
    for run in runs[:-1]:
        for a, b in zip(run.steady(), runs[-1].steady(), strict=True):
            for name in ("policy/loss", "policy/grad_norm", "policy/entropy", "policy/denominator", "reward/mean"):
                assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-5), name


@pytest.mark.parametrize("parts", [1, 2])
def test_two_ranks_give_the_numbers_of_one(spawn: Spawn, world: World, tmp_path: Path, parts: int) -> None:
    """Sharded over gloo, with rows of their own or a part of each sequence; each rank has an engine that serves half
    of the prompts: the same tokens, and metrics equal to 1e-3 of themselves, for sums are taken in another order. Two
    such runs are equal to the bit (test_killed.py)."""
    more = ("trainer.policy.optimizer_config.lr=1e-4", "trainer.algorithm.old_logprobs=learner")
    one = world.train(tmp_path / "one", *more)
    split = ("trainer.placement.policy_num_gpus_per_node=2", f"trainer.policy.sequence_parallel_size={parts}")
    arguments = world.overrides(tmp_path / "two", *more, *split)
    command = spawn(*arguments, f"hydra.run.dir={tmp_path}/two/run")
    assert command.wait(120) == 0, command.err.read_text()
    two = Run(tmp_path / "two" / "run")
    assert two.steps == one.steps and tokens(two) == tokens(one)
    for a, b in zip(one.steady(), two.steady(), strict=True):
        assert b == pytest.approx(a, rel=1e-3, abs=1e-5)
