"""Adapters: which layers get one, that it starts as nothing, and that others read what we write."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from skyrl_train.config.models import LoraConfig
from skyrl_train.errors import ConfigError, MissingPackageError, ModelError
from skyrl_train.models.folders import save_pretrained
from skyrl_train.models.lora import (
    adapted_layers,
    adapter_config,
    adapter_off,
    adapter_tensors,
    add_adapter,
    has_adapter,
    merged_weight,
    save_adapter,
)
from skyrl_train.models.scoring import score
from skyrl_train.models.tokenizers import make_tokenizer

from .helpers import FAMILIES, gradients, make_model, ragged

KEY = "trainer.policy.model.lora"
SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def with_adapter(family: str = "qwen3", *, learned: bool = True, model=None, **settings):
    """A model whose adapter has (as if it had learned) become something."""
    model = make_model(family) if model is None else model
    torch.manual_seed(1)
    add_adapter(model, LoraConfig(**{"rank": 4, "alpha": 6} | settings), KEY)
    if learned:
        for layer in adapted_layers(model).values():
            torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
    return model


def logprobs(model, packed: bool = True) -> torch.Tensor:
    with torch.no_grad():
        return score(model, ragged(), temperature=1.0, packed=packed, with_entropy=False)[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fresh_adapter_changes_nothing_and_a_learned_one_can_be_turned_off(family) -> None:
    base = logprobs(make_model(family))
    assert torch.equal(logprobs(with_adapter(family, learned=False)), base)
    model = with_adapter(family)
    changed = logprobs(model)
    assert (changed - base).abs().max() > 0.1
    assert torch.allclose(changed, logprobs(model, packed=False), atol=1e-4)
    with adapter_off(model):
        assert torch.equal(logprobs(model), base)
    assert torch.equal(logprobs(model), changed)


@pytest.mark.parametrize("method", ["kaiming", "gaussian", "orthogonal"])
def test_each_init_changes_nothing_at_first_and_can_learn(method) -> None:
    model = with_adapter(learned=False, init_method=method)
    assert torch.allclose(logprobs(model), logprobs(make_model()), atol=1e-5)
    loss = score(model, ragged(), temperature=1.0, packed=True, with_entropy=False)[0].sum()
    assert any(g.abs().max() > 0 for g in gradients(model, loss).values())


@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
def test_the_adapter_alone_has_gradients_and_is_float32(family) -> None:
    model = with_adapter(family, model=make_model(family).to(torch.bfloat16))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if ".lora_" in name}
    assert {p.dtype for n, p in model.named_parameters() if n in trained} == {torch.float32}
    assert {p.dtype for n, p in model.named_parameters() if n not in trained} == {torch.bfloat16}


def test_turning_it_off_leaves_the_flags_also_after_an_error() -> None:
    model = with_adapter()
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(KeyError), adapter_off(model):
        assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
        raise KeyError
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    loss = score(model, ragged(), temperature=1.0, packed=True, with_entropy=False)[0].sum()
    assert all(g.abs().max() > 0 for g in gradients(model, loss).values())


def test_scaling_is_alpha_by_rank() -> None:
    model = with_adapter(rank=4, alpha=6, target_modules=["q_proj"])
    (name, layer), *_ = adapted_layers(model).items()
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    expected = make_model().get_submodule(name).weight + 1.5 * b @ a
    assert torch.allclose(merged_weight(layer), expected, atol=1e-6)
    assert not merged_weight(layer).requires_grad and merged_weight(layer).dtype == torch.float32


TARGETS = [
    ({}, SEVEN, 14),
    ({"target_modules": "ALL-LINEAR"}, SEVEN, 14),
    ({"target_modules": ["q_proj", "mlp.up_proj"]}, ["q_proj", "up_proj"], 4),
    ({"target_modules": ["model.layers.1.self_attn.q_proj"]}, ["q_proj"], 1),
    ({"target_modules": r".*\.1\.self_attn\.[qv]_proj"}, ["q_proj", "v_proj"], 2),
    ({"target_modules": ["lm_head", "o_proj"]}, ["o_proj", "lm_head"], 3),
    ({"exclude_modules": ["down_proj", "k_proj"]}, [n for n in SEVEN if n not in ("down_proj", "k_proj")], 10),
    ({"exclude_modules": r".*\.0\..*"}, SEVEN, 7),
    ({"target_modules": ["q_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]}, ["q_proj"], 1),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "kinds", "count"), TARGETS)
def test_targets(settings, kinds, count) -> None:
    model = with_adapter(**settings)
    names = list(adapted_layers(model))
    assert len(names) == count and {name.rpartition(".")[2] for name in names} == set(kinds)
    named = adapter_config(model, "x")["target_modules"]
    per_layer = {"lm_head": 1}
    whole = count == sum(per_layer.get(kind, 2) for kind in kinds)
    assert named == sorted(kinds if whole else names)  # short where that says the same


WRONG = [
    ({"target_modules": ["q_prj"]}, "target_modules", r"no module 'q_prj'.*linear layers are .*q_proj"),
    ({"target_modules": ["q_proj", "w1"]}, "target_modules", "no module 'w1'"),
    ({"target_modules": "q_proj"}, "target_modules", "no module 'q_proj'"),  # a regular expression for the full name
    ({"target_modules": "(q_proj"}, "target_modules", r"no regular expression.*all-linear"),
    ({"target_modules": ["embed_tokens"]}, "target_modules", "model.embed_tokens is of the type Embedding"),
    ({"target_modules": ["self_attn"]}, "target_modules", "is of the type Qwen3Attention"),
    ({"exclude_modules": ["w2"]}, "exclude_modules", "no module 'w2'"),
    ({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, "exclude_modules", "leaves no layer"),
]


@pytest.mark.parametrize(("settings", "key", "words"), WRONG)
def test_targets_that_cannot_be(settings, key, words) -> None:
    with pytest.raises(ConfigError, match=words) as raised:
        with_adapter(**settings)
    assert raised.value.key == f"{KEY}.{key}" and raised.value.remedy


def test_a_tied_output_embedding_gets_none() -> None:
    assert "lm_head" not in adapted_layers(with_adapter("qwen3-tied"))
    with pytest.raises(ConfigError, match="lm_head shares its weight with the input embedding"):
        with_adapter("qwen3-tied", target_modules=["lm_head"])


def test_without_the_package_the_error_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingPackageError, match=r"lora.rank=4 needs the package 'peft'.*skyrl-train\[lora\]"):
        with_adapter()


def test_experts_get_none_and_the_log_says_how_much_is_covered(caplog) -> None:
    from transformers import CONFIG_MAPPING

    from .test_checkpoint_names import EXPERTS, SIZES

    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING["qwen3_moe"](**SIZES, **EXPERTS))
    with caplog.at_level(logging.INFO, "skyrl.models"):
        with_adapter(model=model)
    assert {name.rpartition(".")[2] for name in adapted_layers(model)} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    held = sum(layer.weight.numel() for layer in adapted_layers(model).values())
    total = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    assert "on 8 layers (k_proj, o_proj, q_proj, v_proj)" in caplog.text
    assert f"hold {100 * held / total:.0f}% of them" in caplog.text


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")  # PEFT's own use of transformers
@pytest.mark.parametrize("family", ["qwen3", "qwen3-tied", "gpt2", "gemma3_text"])
def test_peft_and_stock_transformers_read_what_we_write(family, tmp_path: Path) -> None:
    from peft import PeftModel

    tokenizer = make_tokenizer()
    save_pretrained(make_model(family, vocab_size=len(tokenizer)), tokenizer, tmp_path / "base")
    model = with_adapter(family, model=make_model(family, vocab_size=len(tokenizer)))
    expected = logprobs(model)
    save_adapter(model, str(tmp_path / "base"), tmp_path / "adapter")
    save_pretrained(model, tokenizer, tmp_path / "merged")
    assert has_adapter(model) and torch.equal(logprobs(model), expected)  # writing changed nothing

    def stock(folder: Path):
        return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa")

    through_peft = PeftModel.from_pretrained(stock(tmp_path / "base"), tmp_path / "adapter").eval()
    for found in (logprobs(through_peft.base_model.model, packed=False), logprobs(stock(tmp_path / "merged"), False)):
        assert torch.allclose(found, expected, atol=1e-4)
    written = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    ours = adapter_tensors(model)
    assert written.keys() == ours.keys() and all(torch.equal(written[name], ours[name]) for name in ours)
    assert all(name.startswith("base_model.model.") and name.endswith(".weight") for name in ours)
    assert all("default" not in name and not tensor.requires_grad for name, tensor in ours.items())
    assert load_file(tmp_path / "merged" / "model.safetensors").keys() == load_file(
        tmp_path / "base" / "model.safetensors"
    ).keys()  # fmt: skip


def test_tensors_to_send_are_the_parameters_themselves() -> None:
    model = with_adapter(target_modules=["q_proj"])
    tensors = adapter_tensors(model)
    assert list(tensors)[:2] == [f"base_model.model.model.layers.0.self_attn.q_proj.lora_{p}.weight" for p in "AB"]
    parameters = {p.data_ptr() for p in model.parameters() if p.requires_grad}
    assert {tensor.data_ptr() for tensor in tensors.values()} == parameters


def test_an_adapters_folder_is_replaced_whole_and_nothing_else_is(tmp_path: Path) -> None:
    model = with_adapter(rank=2)
    save_adapter(with_adapter(), "base", tmp_path / "adapter")
    save_adapter(model, "base", tmp_path / "adapter")
    assert load_file(tmp_path / "adapter" / "adapter_model.safetensors").keys() == adapter_tensors(model).keys()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter"]
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="other things in it"):
        save_adapter(model, "base", tmp_path / "home")


def test_an_alpha_that_is_no_integer_stays_what_it_is() -> None:
    assert adapter_config(with_adapter(alpha=2.5), "x")["lora_alpha"] == 2.5
    whole = adapter_config(with_adapter(alpha=16.0), "x")["lora_alpha"]
    assert whole == 16 and isinstance(whole, int)
