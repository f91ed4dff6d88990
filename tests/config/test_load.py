"""Typing, limits, suggestions: what the loader takes and what it refuses."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
from omegaconf import OmegaConf

from skyrl_train.config.load import from_mapping
from skyrl_train.config.problems import ConfigErrors
from skyrl_train.config.schema import tree, value_of
from skyrl_train.config.suggest import nearest_keys
from skyrl_train.errors import ConfigError


def nested(name: str, value: Any) -> dict[str, Any]:
    for part in reversed(name.split(".")):
        value = {part: value}
    return value


def merge(into: dict[str, Any], other: dict[str, Any]) -> None:
    for name, value in other.items():
        if isinstance(value, dict) and isinstance(into.get(name), dict):
            merge(into[name], value)
        else:
            into[name] = value


@pytest.mark.parametrize(
    ("name", "given", "typed"),
    [
        ("trainer.policy.optimizer_config.lr", "1e-6", 1e-6),  # plain YAML reads this as text
        ("trainer.policy.optimizer_config.lr", 1, 1.0),
        ("trainer.train_batch_size", 1e3, 1000),
        ("trainer.run_name", 7, "7"),
        ("data.train_data", "one.parquet", ["one.parquet"]),
        ("data.train_data", ["a", "b"], ["a", "b"]),
        ("trainer.logger", "wandb", "wandb"),
        ("trainer.logger", ["console", "my.sinks:Sink"], ["console", "my.sinks:Sink"]),
        ("generator.sampling_params.logit_bias", {5: 1}, {5: 1.0}),
        ("generator.sampling_params.stop", ["</a>", "b"], ["</a>", "b"]),
        ("generator.sampling_params.stop", "</a>", "</a>"),
        ("generator.sampling_params.top_k", 0, -1),
        ("trainer.eval_interval", 0, -1),
        ("trainer.ckpt_interval", 0, -1),
        ("trainer.bf16", None, None),
        ("trainer.rope_scaling", {"type": "yarn", "factor": 2.0}, {"type": "yarn", "factor": 2.0}),
        ("trainer.algorithm.policy_loss_type", "my.losses:mine", "my.losses:mine"),
        ("generator.engine_init_kwargs", {"a": {"b": [1, None]}}, {"a": {"b": [1, None]}}),
    ],
)
def test_values_are_typed(name: str, given: Any, typed: Any) -> None:
    got = value_of(from_mapping(nested(name, given)), name)
    assert got == typed
    assert type(got) is type(typed)


def test_home_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    config = from_mapping(
        {"data": {"train_data": ["~/a.parquet", "org/b"]}, "trainer": {"ckpt_path": "${oc.env:HOME}/c/"}}
    )
    assert config.data.train_data == ["/home/someone/a.parquet", "org/b"]
    assert config.trainer.ckpt_path == "/home/someone/c/"
    assert config.trainer.export_path == "/home/someone/exports/skyrl/test_run"


def test_no_key_takes_what_its_type_does_not_allow() -> None:
    """A list of mappings fits no key, save those that hold mappings, which take no number. All are told at once."""
    given: dict[str, Any] = {}
    wrong: dict[str, Any] = {n: 3.5 if "dict" in str(leaf.type) else [{"a": 1}] for n, leaf in tree().items()}
    for name, value in wrong.items():
        merge(given, nested(name, value))
    with pytest.raises(ConfigErrors) as caught:
        from_mapping(given)
    errors = [error for error in caught.value.errors if isinstance(error, ConfigError)]
    echoes = {name for name, leaf in tree().items() if leaf.key.follows}  # told once, at the key that they follow
    assert [error.key for error in errors] == [name for name in tree() if name not in echoes]
    for error in errors:
        assert "expects" in error.reason and repr(wrong[error.key]) in str(error)


def test_a_misspelled_key_finds_the_right_one() -> None:
    missed = []
    for name in tree():
        parent, _, last = name.rpartition(".")
        if len(last) < 5:
            continue
        wrong = f"{parent}.{last[:2]}{last[3:]}"
        if name not in nearest_keys(wrong):
            missed.append(wrong)
    assert missed == []


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("trainer.optimizer.lr", "trainer.policy.optimizer_config.lr"),
        ("trainer.learning_rate", "trainer.policy.optimizer_config.lr"),
        ("generator.temperature", "generator.sampling_params.temperature"),
        ("generator.max_tokens", "generator.sampling_params.max_generate_length"),
        ("generator.tensor_parallel_size", "generator.inference_engine_tensor_parallel_size"),
        ("trainer.ckpt_dir", "trainer.ckpt_path"),
        ("trainer.num_generations", "generator.n_samples_per_prompt"),
        ("model.path", "trainer.policy.model.path"),
        ("seed", "trainer.seed"),
    ],
)
def test_names_from_elsewhere_lead_here(wrong: str, right: str) -> None:
    with pytest.raises(ConfigError, match="there is no such key") as caught:
        from_mapping(nested(wrong, 1))
    assert caught.value.key == wrong
    assert right in caught.value.remedy


def test_all_mistakes_are_told_at_once() -> None:
    with pytest.raises(ConfigErrors) as caught:
        from_mapping({"trainer": {"seed": "x", "epochs": 0, "sead": 1}, "generator": {"max_turns": None}})
    assert [error.key for error in caught.value.errors if isinstance(error, ConfigError)] == [
        "trainer.epochs", "trainer.seed", "trainer.sead", "generator.max_turns",
    ]  # fmt: skip
    again = pickle.loads(pickle.dumps(caught.value))
    assert str(again) == str(caught.value)
    assert str(caught.value).startswith("the config: 4 mistakes.\n  trainer.epochs=0: must be at least 1.")


def test_a_mistake_is_not_told_again_at_keys_that_follow() -> None:
    with pytest.raises(ConfigError) as caught:
        from_mapping({"trainer": {"max_prompt_length": "long"}})
    assert not isinstance(caught.value, ConfigErrors)
    assert caught.value.key == "trainer.max_prompt_length"


def test_empty_sections_are_empty() -> None:
    assert from_mapping({"trainer": None, "generator": {"sampling_params": None}}) == from_mapping({})


def test_settings_of_any_env_are_kept() -> None:
    config = from_mapping({
        "environment": {"skyrl_gym": {"gsm8k": {"method": "flexible"}, "search": {"topk": 5}, "max_env_workers": 4}}
    })  # fmt: skip
    gym = config.environment.skyrl_gym
    assert gym.settings("gsm8k") == {"method": "flexible"}
    assert gym.settings("search")["topk"] == 5
    assert gym.settings("absent") == {}
    assert gym.settings("max_env_workers") == {}


def test_omegaconf_objects_are_taken() -> None:
    config = from_mapping(OmegaConf.create({"trainer": {"seed": 3, "run_name": "r${trainer.seed}"}}))
    assert config.trainer.run_name == "r3"


def test_sizes_that_follow_are_filled_in() -> None:
    config = from_mapping({
        "trainer": {"max_prompt_length": 32, "policy_mini_batch_size": 16, "train_batch_size": 32},
        "generator": {"n_samples_per_prompt": 8, "sampling_params": {"max_generate_length": 40}},
    })  # fmt: skip
    # 8192 / 72 = 113 sequences fit; the largest divisor of 16 x 8 = 128 below is 64. 16384 / 72 = 227.
    assert config.trainer.micro_train_batch_size_per_gpu == 64
    assert config.trainer.micro_forward_batch_size_per_gpu == 227
    assert config.trainer.algorithm.max_seq_len is None
    config = from_mapping({"trainer": {"algorithm": {"loss_reduction": "seq_mean_token_sum_norm"}}})
    assert config.trainer.algorithm.max_seq_len == 512 + 1024
