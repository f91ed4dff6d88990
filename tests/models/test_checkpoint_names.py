"""The names that engines load by are those of the files that transformers writes, also merged and sharded."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from skyrl_train.config.models import LoraConfig
from skyrl_train.models.checkpoint_names import checkpoint_tensors, whole_state_dict
from skyrl_train.models.gather import full_tensor
from skyrl_train.models.lora import adapted_layers, adapter_tensors, add_adapter, merged_weight

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
FAMILIES = [
    ("qwen3", {"tie_word_embeddings": True}),
    ("qwen3", {"tie_word_embeddings": False}),
    ("qwen2", {}),
    ("llama", {}),
    ("qwen3_moe", EXPERTS),
]


def make(family: str, more: dict, rank: int = 0):
    """A model of random weights, with an adapter of random weights if ``rank`` is given. Equal calls: equal models."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**(SIZES | more)))
    if rank:
        add_adapter(model, LoraConfig(rank=rank), "lora")
        for layer in adapted_layers(model).values():
            torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
    return model


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize(("family", "more"), FAMILIES)
def test_names_and_values_are_those_of_the_checkpoint(family, more, rank, tmp_path):
    model = make(family, more, rank)
    model.save_pretrained(tmp_path, state_dict=whole_state_dict(model) if rank else None)
    written = load_file(tmp_path / "model.safetensors")
    ours = checkpoint_tensors(model)
    assert set(ours) == set(written) and len(ours) == len(written)
    for name, tensor in written.items():
        assert torch.equal(ours[name], tensor), name
        assert (ours.spec(name).shape, ours.spec(name).dtype) == (tensor.shape, tensor.dtype)
        assert ours.spec(name).nbytes == tensor.nbytes
        assert not ours[name].requires_grad
    assert any(".base_layer." in name for name in model.state_dict()) == bool(rank)


def test_experts_are_un_fused():
    model = make("qwen3_moe", EXPERTS)
    names = set(checkpoint_tensors(model))
    assert "model.layers.1.mlp.experts.3.down_proj.weight" in names
    assert not any("gate_up_proj" in name for name in names)


@pytest.mark.parametrize(("family", "more"), FAMILIES)
def test_they_come_layer_by_layer(family, more):
    """A sender that takes them in order holds one layer's parts at a time."""
    names = list(checkpoint_tensors(make(family, more, rank=2)))
    assert names[0] == "model.embed_tokens.weight"
    layers = [int(name.split(".")[2]) for name in names if name.startswith("model.layers.")]
    assert layers == sorted(layers) and set(layers) == {0, 1}


def test_nothing_is_copied_that_need_not_be_and_changes_show():
    model = make("qwen3_moe", EXPERTS, rank=2)
    own = {p.data_ptr() for p in model.parameters()}
    ours = checkpoint_tensors(model)
    merged = {f"{name}.weight" for name in adapted_layers(model)}
    for name in ours:
        if name not in merged and ".experts." not in name:
            assert ours[name].data_ptr() in own
    before = {name: tensor.clone() for name, tensor in ours.items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    for name, tensor in checkpoint_tensors(model).items():
        assert not torch.equal(tensor, before[name]), name


def test_an_unknown_name_is_a_key_error():
    with pytest.raises(KeyError, match=r"model\.layers\.9"):
        checkpoint_tensors(make("qwen2", {}))["model.layers.9.mlp.up_proj.weight"]


def shard(model):
    """FSDP2 over every rank: each layer, then the rest."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def sharded_is_whole(family: str, more: dict, rank: int) -> int:
    """Runs on each rank: every tensor of the sharded model, gathered in order, is that of the whole model."""
    whole, parts = make(family, more, rank), shard(make(family, more, rank))
    held = sum(p.to_local().numel() for p in parts.parameters())  # type: ignore[union-attr]
    assert held < 0.6 * sum(p.numel() for p in whole.parameters())
    expected, found = checkpoint_tensors(whole), checkpoint_tensors(parts)
    assert list(expected) == list(found)
    for name, tensor in found.items():
        assert found.spec(name) == expected.spec(name)
        assert torch.equal(full_tensor(tensor), expected[name]), name
    sent = {name: full_tensor(tensor) for name, tensor in adapter_tensors(parts).items()}
    assert sent.keys() == adapter_tensors(whole).keys()
    assert all(torch.equal(tensor, adapter_tensors(whole)[name]) for name, tensor in sent.items())
    for part, layer in zip(adapted_layers(parts).values(), adapted_layers(whole).values(), strict=True):
        assert torch.equal(merged_weight(part), merged_weight(layer))
    return len(found)


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize(("family", "more"), [FAMILIES[0], FAMILIES[4]])
def test_a_sharded_models_tensors_are_the_whole_ones(ranks, family, more, rank):
    expected = len(checkpoint_tensors(make(family, more)))
    assert ranks(sharded_is_whole, family, more, rank) == [expected, expected]
