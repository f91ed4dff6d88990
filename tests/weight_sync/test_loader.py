"""The loader that runs inside SGLang, on models that hold their weights as its ranks do."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import nn

from skyrl_train.engines.sglang.inside import skyrl_loader  # pyright: ignore[reportAttributeAccessIssue]
from skyrl_train.engines.sglang.payloads import Spec, pack, plan_buckets
from skyrl_train.weight_sync.digests import digest, told
from skyrl_train.weight_sync.directions import directions, question
from skyrl_train.weight_sync.layout import Layout, Rank

L = "model.layers.0."
SHAPES = {
    "model.embed_tokens.weight": (100, 8),
    f"{L}self_attn.q_proj.weight": (16, 8),
    f"{L}self_attn.k_proj.weight": (4, 8),
    f"{L}self_attn.v_proj.weight": (4, 8),
    f"{L}self_attn.o_proj.weight": (8, 16),
    f"{L}mlp.gate_proj.weight": (12, 8),
    f"{L}mlp.up_proj.weight": (12, 8),
    f"{L}mlp.down_proj.weight": (8, 12),
    "model.norm.weight": (8,),
}
LAYOUT = Layout(SHAPES, kv_heads=2)
RANKS = [Rank(), Rank(tensor_rank=0, tensor_size=2), Rank(tensor_rank=1, tensor_size=2)]


class Held(nn.Module):
    """Parameters under the names of a rank; what goes past the loader's own way is kept."""

    def __init__(self, rank: Rank, adapter: bool = False) -> None:
        super().__init__()
        self.passed: list[str] = []
        for held, parts in LAYOUT.parts.items():
            found = torch.cat([LAYOUT.slice(name, torch.empty(SHAPES[name]), rank) for name in parts])
            name = held.replace("_proj.", "_proj.base_layer.") if adapter else held
            module: nn.Module = self
            *path, last = name.split(".")
            for part in path:
                if not hasattr(module, part):
                    module.add_module(part, nn.Module())
                module = getattr(module, part)
            module.register_parameter(last, nn.Parameter(torch.full_like(found, torch.nan), requires_grad=False))

    def load_weights(self, named: list[tuple[str, torch.Tensor]]) -> None:
        self.passed += [name for name, _ in named]
        self.given = {name: tensor.clone() for name, tensor in named}


def send(model: Held, rank: Rank, tensors: dict[str, torch.Tensor], *, tied: bool = True, limit: int = 800) -> None:
    pieces, totals = LAYOUT.pieces(SHAPES, rank)
    for bucket in plan_buckets([Spec(name=n, shape=s, dtype=torch.float32) for n, s in SHAPES.items()], limit):
        flat, _ = pack(bucket, [tensors[spec.name] for spec in bucket], "cpu")
        skyrl_loader.load(model, [(directions(bucket, pieces, totals, tied=tied), flat)])
        flat.zero_()  # the bucket is used again


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("rank", RANKS)
def test_every_tensor_arrives_where_the_rank_holds_it(rank: Rank, adapter: bool) -> None:
    model = Held(rank, adapter)
    for _ in range(3):  # the first makes the views, the others use them
        tensors = {name: torch.randn(shape) for name, shape in SHAPES.items()}
        for parameter in model.parameters():
            parameter.data.fill_(torch.nan)
        send(model, rank, tensors)
        for name, parameter in model.named_parameters():
            parts = LAYOUT.parts[name.replace(".base_layer", "")]
            wanted = torch.cat([LAYOUT.slice(part, tensors[part], rank) for part in parts])
            assert torch.equal(parameter, wanted), name
    assert not model.passed


@pytest.mark.parametrize("rank", RANKS)
def test_it_converts_what_comes_in_another_number_format(rank: Rank) -> None:
    model = Held(rank).bfloat16()
    tensors = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    send(model, rank, tensors)
    for name, parameter in model.named_parameters():
        wanted = torch.cat([LAYOUT.slice(part, tensors[part].bfloat16(), rank) for part in LAYOUT.parts[name]])
        assert parameter.dtype == torch.bfloat16 and torch.equal(parameter, wanted), name
    assert not model.passed


def test_memory_that_is_held_is_the_last_alone() -> None:
    model, tensors = Held(Rank()), {name: torch.randn(shape) for name, shape in SHAPES.items()}
    pieces, totals = LAYOUT.pieces(SHAPES, Rank())
    (bucket,) = plan_buckets([Spec(name=n, shape=s, dtype=torch.float32) for n, s in SHAPES.items()])

    def load(*, hold: bool, tied: bool = True) -> weakref.ref:
        flat, _ = pack(bucket, [tensors[spec.name] for spec in bucket], "cpu")
        skyrl_loader.load(model, [(directions(bucket, pieces, totals, tied=tied, hold=hold), flat)])
        return weakref.ref(flat)

    first = load(hold=True)
    assert first() is not None
    second = load(hold=True)
    assert first() is None and second() is not None
    assert load(hold=False)() is None and second() is None, "another message: the memory may be another"


@pytest.mark.parametrize("adapter", [False, True])
def test_it_tells_what_the_model_holds(adapter: bool) -> None:
    model, names = Held(Rank(), adapter), list(LAYOUT.parts)
    if adapter:
        model.model.norm.lora_A = nn.Parameter(torch.zeros(3))
    for parameter in model.parameters():
        parameter.data.normal_()
    out = torch.zeros(len(names), dtype=torch.int64)
    for turn in range(2):
        next(model.parameters()).data[0, 0] += turn  # whoever has changed it
        skyrl_loader.load(model, [(question(names), out)])
        found = {name.replace(".base_layer", ""): parameter for name, parameter in model.named_parameters()}
        assert told(out, "sha256") == [digest(found[name], "sha256") for name in names]
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    skyrl_loader.load(model, [(question(names), out)])
    assert told(out, "sha256") == [digest(found[name], "sha256") for name in names], "of any number format"


@pytest.mark.parametrize("fault", ["more", "less", "broken"])
def test_it_tells_nothing_of_a_model_that_is_another(fault: str, caplog: pytest.LogCaptureFixture) -> None:
    model, names = Held(Rank()), list(LAYOUT.parts)
    out = torch.zeros(len(names), dtype=torch.int64)
    if fault == "more":
        model.more = nn.Parameter(torch.zeros(3))
    elif fault == "less":
        del model.model.norm.weight
    else:
        out = torch.zeros(len(names) - 1, dtype=torch.int64)
    for _ in range(2):
        skyrl_loader.load(model, [(question(names), out)])
        assert told(out, "sha256") is None
    assert caplog.text.count("SGLang is asked for them") == (fault == "broken")


def test_memory_that_has_moved_is_found_again() -> None:
    model, tensors = Held(Rank()), {name: torch.ones(shape) for name, shape in SHAPES.items()}
    send(model, Rank(), tensors)
    old = [parameter.data for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.data = torch.full_like(parameter, torch.nan)
    for data in old:
        data.zero_()
    send(model, Rank(), tensors)
    assert all(parameter.nan_to_num(9.0).max() == 1.0 for parameter in model.parameters())
    assert not any(data.any() for data in old)


@pytest.mark.parametrize("fault", ["size", "dtype", "name", "copy of the embedding"])
def test_what_does_not_fit_goes_through_the_models_own_loader(fault: str, caplog: pytest.LogCaptureFixture) -> None:
    model, tensors = Held(Rank()), {name: torch.randn(shape) for name, shape in SHAPES.items()}
    if fault == "size":
        model.model.norm.weight = nn.Parameter(torch.zeros(9), requires_grad=False)
    elif fault == "dtype":
        model.model.norm.weight = nn.Parameter(torch.zeros(8, dtype=torch.int8), requires_grad=False)
    elif fault == "name":
        del model.model.norm.weight
    else:
        model.lm_head = nn.Module()
        model.lm_head.weight = nn.Parameter(torch.zeros(128, 8), requires_grad=False)
    send(model, Rank(), tensors, limit=1 << 20)
    assert model.passed == list(SHAPES), "the whole bucket"
    assert all(torch.equal(model.given[name], tensors[name]) for name in SHAPES)
    assert "the model's own loader" in caplog.text
