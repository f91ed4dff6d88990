"""Every setting that a run can take is taken: it runs, and leaves its mark on the numbers."""

from __future__ import annotations

from pathlib import Path

import pytest

from .conftest import SMALL, Run, World, make_world

COIN = ("environment.env_class=integration.toy_envs:Coin",)
LEARNS = "trainer.policy.optimizer_config.lr=1e-3"


@pytest.fixture(scope="module")
def plain(world: World, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The run that the others are compared with."""
    return world.train(tmp_path_factory.mktemp("plain"))


def is_sound(run: Run) -> None:
    assert run.steps == [1, 2, 3]
    for line in run.history:
        assert line["policy/skipped_updates_total"] == 0 and line["policy/updates"] == 2
        assert line["trajectories/failed"] == 0


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean", "seq_mean_token_sum_norm"])
def test_loss_reductions(world: World, plain: Run, tmp_path: Path, reduction: str) -> None:
    run = world.train(tmp_path, f"trainer.algorithm.loss_reduction={reduction}")
    is_sound(run)
    assert (run.steady() == plain.steady()) == (reduction == "token_mean")


SCHEDULES = {  # learning rates of updates 1 to 6, two a step, as shares of the peak; 2 updates of warm-up
    "constant": [1, 1, 1, 1, 1, 1],
    "constant_with_warmup": [0, 0.5, 1, 1, 1, 1],
    "linear": [0, 0.5, 1, 0.75, 0.5, 0.25],
    "cosine": [0, 0.5, 1, 0.8535534, 0.5, 0.1464466],
    "cosine_with_restarts": [0, 0.5, 1, 0.8535534, 0.5, 0.1464466],
    "polynomial": [0, 0.5, 1, 0.75, 0.5, 0.25],
    "inverse_sqrt": [0, 0.5, 1, (2 / 3) ** 0.5, 0.5**0.5, 0.4**0.5],
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedulers(world: World, tmp_path: Path, name: str) -> None:
    section = "trainer.policy.optimizer_config"
    run = world.train(tmp_path, f"{section}.scheduler={name}", f"{section}.num_warmup_steps=2")
    is_sound(run)
    share = SCHEDULES[name]
    expected = [1e-3 * (share[i] + share[i + 1]) / 2 for i in (0, 2, 4)]
    assert [line["policy/lr"] for line in run.history] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "abs"])
def test_kl_in_the_loss(world: World, tmp_path: Path, estimator: str) -> None:
    kl = ("trainer.algorithm.use_kl_loss=true", f"trainer.algorithm.kl_estimator_type={estimator}")
    run = world.train(tmp_path, *kl, "trainer.algorithm.kl_loss_coef=0.1")
    is_sound(run)
    assert "time/ref_logprobs" in run.history[0]
    moved = [abs(line["policy/kl_loss"]) for line in run.history]
    assert moved[0] < moved[-1]  # it starts at the reference and leaves it


def test_a_strong_kl_holds_the_policy_back(world: World, tmp_path: Path) -> None:
    more = (*COIN, "trainer.algorithm.use_kl_loss=true", "trainer.max_steps=8")
    weak, strong = (
        world.train(tmp_path, *more, f"trainer.algorithm.kl_loss_coef={c}", name=f"kl{c}") for c in (0.0001, 10)
    )
    assert strong.last["policy/kl_loss"] < 0.5 * weak.last["policy/kl_loss"]


def test_kl_in_the_reward(world: World, plain: Run, tmp_path: Path) -> None:
    more = ("trainer.algorithm.use_kl_in_reward=true", "trainer.algorithm.kl_loss_coef=0.5")
    run = world.train(tmp_path, *more)
    is_sound(run)
    assert "policy/kl_loss" not in run.last
    assert run.history[0]["reward/mean"] == plain.history[0]["reward/mean"]  # the task's own
    assert run.last["policy/loss"] != plain.last["policy/loss"]


def test_an_entropy_bonus_raises_entropy(world: World, tmp_path: Path) -> None:
    """The task pays every answer alike, so that the bonus alone decides."""
    more = ("environment.env_class=integration.toy_envs:Constant", "trainer.max_steps=8",
            "trainer.algorithm.use_entropy_loss=true")  # fmt: skip
    run = world.train(tmp_path, *more, "trainer.algorithm.entropy_loss_coef=1.0")
    entropy = [line["policy/entropy"] for line in run.history]
    assert entropy[-1] > 1.2 * entropy[0]


def test_groups_that_teach_nothing_are_filtered(world: World, tmp_path: Path) -> None:
    run = world.train(tmp_path, "trainer.algorithm.zero_variance_filter=true", "trainer.train_batch_size=8")
    plain = world.train(tmp_path, "trainer.train_batch_size=8", name="plain")
    dead = run.history[0]["groups/dead_fraction"]
    assert 0 < dead < 1  # else this test shows nothing
    filtered, whole = run.history[0]["policy/denominator"], plain.history[0]["policy/denominator"]
    assert filtered == pytest.approx(whole * (1 - dead), rel=0.2)


def test_a_step_in_which_every_group_is_filtered_goes_by(world: World, tmp_path: Path) -> None:
    more = ("environment.env_class=integration.toy_envs:Constant", "trainer.algorithm.zero_variance_filter=true")
    run = world.train(tmp_path, *more, "trainer.policy.optimizer_config.weight_decay=0")
    is_sound(run)
    assert run.last["groups/dead_fraction"] == 1 and run.last["policy/grad_norm"] == 0


@pytest.mark.parametrize("reentrant", ["true", "false"])
def test_gradient_checkpointing_changes_memory_alone(world: World, plain: Run, tmp_path: Path, reentrant: str) -> None:
    option = f"trainer.gradient_checkpointing_use_reentrant={reentrant}"
    run = world.train(tmp_path, "trainer.gradient_checkpointing=true", option)
    for a, b in zip(run.steady(), plain.steady(), strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-5)


def test_bfloat16_on_a_cpu(world: World, tmp_path: Path) -> None:
    run = world.train(tmp_path, "trainer.bf16=true", "trainer.hf_save_interval=3")
    is_sound(run)
    assert 1e-5 < run.history[0]["mismatch/mean"] < 0.1  # so the learner's own are the old log-probs, in every step
    assert all("mismatch/mean" in line for line in run.history)
    assert run.history[0]["policy/ratio_gap_first"] < 1e-4


def test_temperature_is_the_learners_too(world: World, plain: Run, tmp_path: Path) -> None:
    cool = world.train(tmp_path, "generator.sampling_params.temperature=0.7")
    is_sound(cool)
    assert cool.history[0]["mismatch/mean"] < 1e-4
    assert cool.history[0]["policy/entropy"] < plain.history[0]["policy/entropy"]


def test_stop_strings_end_completions_and_stay_in_them(world: World, tmp_path: Path) -> None:
    run = world.train(tmp_path, "generator.sampling_params.stop=[';']")
    is_sound(run)
    for t in run.trajectories(1):
        text = t["messages"][-1]["content"]
        assert t["stop_reason"] == "length" or ";" not in text[:-1]
    assert any(t["messages"][-1]["content"].endswith(";") for t in run.trajectories(1))
    assert run.history[0]["mismatch/mean"] < 1e-4


def test_tokens_that_a_budget_cut_are_left_out(world: World, tmp_path: Path) -> None:
    more = ("generator.sampling_params.max_generate_length=13", "generator.apply_overlong_filtering=true",
            "generator.zero_reward_on_non_stop=true")  # fmt: skip
    run = world.train(tmp_path, *more)
    cut = [t for t in run.trajectories(1) if t["outcome"] == "truncated"]
    assert cut and all(sum(t["loss_mask"]) == 0 and t["reward"] == 0 for t in cut)
    assert run.history[0]["response/truncated"] == pytest.approx(len(cut) / 16)


def test_several_passes_over_a_batch(world: World, tmp_path: Path) -> None:
    run = world.train(tmp_path, "trainer.update_epochs_per_batch=3")
    assert run.last["policy/updates"] == 6
    assert run.last["policy/ratio_gap_first"] < 1e-4 < run.last["policy/ratio_gap"]


def test_epochs_end_a_run(world: World, tmp_path: Path) -> None:
    more = ("trainer.max_steps=null", "trainer.epochs=2", "trainer.train_batch_size=44")
    run = world.train(tmp_path, *more, "trainer.policy_mini_batch_size=44", "generator.n_samples_per_prompt=2")
    assert run.steps == [1, 2, 3, 4]  # 90 prompts: two of 44 an epoch
    asked = [{t["prompt"] for t in run.trajectories(step)} for step in run.steps]
    assert not asked[0] & asked[1] and not asked[2] & asked[3] and asked[0] != asked[2]


def test_a_loss_of_ones_own(world: World, tmp_path: Path) -> None:
    run = world.train(tmp_path, "trainer.algorithm.policy_loss_type=integration.toy_losses:likelihood")
    is_sound(run)
    assert run.last["policy/mark"] == 7


@pytest.mark.parametrize("conversation", ["true", "false"])
def test_a_game_of_several_turns(guessing: World, tmp_path: Path, conversation: str) -> None:
    more = ("environment.env_class=guess", "generator.max_turns=3", "generator.max_input_length=200",
            "generator.sampling_params.max_generate_length=8", "trainer.max_prompt_length=60",
            "trainer.algorithm.use_kl_loss=true")  # fmt: skip
    run = guessing.train(tmp_path, *more, f"generator.use_conversation_multi_turn={conversation}")
    is_sound(run)
    assert run.history[0]["response/turns_mean"] > 1
    assert run.history[0]["mismatch/mean"] < 1e-4
    assert {"env/guess/won", "env/guess/turns"} <= set(run.last)
    for t in run.trajectories(1):
        assert sum(t["loss_mask"]) == sum(turn["end"] - turn["start"] for turn in t["turns"])
        for turn in t["turns"]:
            assert all(t["loss_mask"][turn["start"] : turn["end"]])
        if len(t["turns"]) > 1:
            assert 0 in t["loss_mask"]  # what the env said


FAMILIES = {
    "gpt2": "{model_type: gpt2, n_embd: 32, n_layer: 2, n_head: 2, n_positions: 128, attn_pdrop: 0.1}",
    "llama": SMALL.replace("qwen3", "llama"),
    "mistral": SMALL.replace("qwen3", "mistral") + "sliding_window: 6\n",
    "qwen2": SMALL.replace("qwen3", "qwen2")
    .replace("head_dim: 32\n", "")
    .replace("embeddings: false", "embeddings: true"),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_other_families(tmp_path: Path, family: str) -> None:
    """Engine, learner and reference agree, whatever the architecture; dropout is off; the export loads."""
    from transformers import AutoModelForCausalLM

    world = make_world(tmp_path, "addition", "3", "--digits", "1", shape=FAMILIES[family])
    run = world.train(
        tmp_path, "environment.env_class=integration.toy_envs:Coin", "trainer.algorithm.use_kl_loss=true",
        "trainer.algorithm.old_logprobs=learner", "trainer.hf_save_interval=3",
    )  # fmt: skip
    is_sound(run)
    assert all(line["mismatch/mean"] < 1e-4 and line["policy/ratio_gap_first"] < 1e-4 for line in run.history)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "exports" / "global_step_3" / "policy")
    assert exported.config.model_type == family
