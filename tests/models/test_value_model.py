"""The value head: values of each token as alone, packed and padded, gradients, and where the head starts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from skyrl_train.errors import ModelError
from skyrl_train.models.loading import load_model
from skyrl_train.models.value_model import ValueModel, values_of

from .helpers import FAMILIES, gradients, largest_gap, make_batch, make_model, ragged

HERE = str(Path(__file__).parent)
"""A folder without weights."""


def value_model(family: str = "qwen3") -> ValueModel:
    torch.manual_seed(1)
    return ValueModel(make_model(family), HERE, "value_head").eval()


def alone(model: ValueModel, batch, row: int) -> torch.Tensor:
    """The value of the state before each response token: the head on the hidden state of the token before it."""
    prompt, response = batch.prompt(row), batch.response(row)
    with torch.no_grad():
        hidden = model.backbone(input_ids=torch.tensor([prompt + response])).last_hidden_state[0]
    return (hidden @ model.value_head.weight[0])[len(prompt) - 1 : -1]  # pyright: ignore


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_each_token_has_its_value_as_alone(family, packed):
    model, batch = value_model(family), ragged()
    with torch.no_grad():
        values = values_of(model, batch, packed=packed)
    assert values.shape == batch.response_ids.shape and values.dtype == torch.float32
    for row in range(len(batch)):
        expected = alone(model, batch, row)
        torch.testing.assert_close(values[row, : len(expected)], expected, rtol=0, atol=1e-5)
        assert not values[row, len(expected) :].any()


def test_gradients_of_packed_and_padded_agree():
    model, batch = value_model(), ragged()
    found = []
    for packed in (False, True):
        values = values_of(model, batch, packed=packed)
        pull = torch.linspace(-1, 1, values.numel()).view_as(values)
        found.append(gradients(model, (values * pull).sum()))  # pyright: ignore[reportArgumentType]
    assert largest_gap(*found) < 1e-6
    assert found[0]["value_head.weight"].abs().sum() > 0


@pytest.mark.parametrize("packed", [True, False])
def test_one_token_and_no_token(packed):
    values = values_of(value_model(), make_batch([[3, 4], [5]], [[6], []], width=3), packed=packed)
    assert values.shape == (2, 3)
    assert values[0, 0] != 0 and not values[0, 1:].any() and not values[1].any()


def test_the_output_layer_is_left_out():
    names = [name for name, _ in value_model().named_parameters()]
    assert "value_head.weight" in names and not any("lm_head" in name for name in names)
    tied = [name for name, _ in value_model("qwen3-tied").named_parameters()]
    assert any("embed_tokens" in name for name in tied)  # the embedding is the body's, tied or not


def test_a_random_head_is_small():
    model = make_model()
    draws = torch.cat([ValueModel(model, HERE, "v").v.weight.flatten() for _ in range(40)])  # pyright: ignore
    assert draws.std().item() == pytest.approx(1 / 33, rel=0.1) and abs(draws.mean().item()) < 0.003


def loaded(folder, head: str = "value_head") -> ValueModel:
    model = load_model(
        str(folder), dtype=torch.float32, device=torch.device("cpu"), config_kwargs={}, rope_scaling=None,
        rope_theta=None,
    )  # fmt: skip
    return ValueModel(model, str(folder), head)


def test_a_head_in_the_folder_is_taken(copy):
    folder = copy()
    tensors = load_file(folder / "model.safetensors")
    width = tensors["model.embed_tokens.weight"].shape[1]
    mine = torch.linspace(-1, 1, width)[None]
    save_file(tensors | {"score.weight": mine}, folder / "model.safetensors", {"format": "pt"})
    model = loaded(folder, "score")
    assert torch.equal(model.score.weight.detach(), mine)  # pyright: ignore
    assert not torch.equal(loaded(folder).value_head.weight.detach(), mine)  # pyright: ignore


def test_a_head_of_another_shape_is_refused(copy):
    folder = copy()
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"score.weight": torch.ones(2, 5)}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"score\.weight.*has shape \[2, 5\], expected \[1, \d+\]"):
        loaded(folder, "score")
