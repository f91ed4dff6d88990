"""How SGLang's ranks hold a checkpoint, by hand; that real servers do is shown in test_families.py."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from skyrl_train.weight_sync.layout import Layout, Rank, place

TWO = [Rank(tensor_rank=rank, tensor_size=2) for rank in (0, 1)]
L = "model.layers.0."


@pytest.mark.parametrize(
    ("name", "held", "part", "kind"),
    [
        (f"{L}self_attn.q_proj.weight", f"{L}self_attn.qkv_proj.weight", (0,), "rows"),
        (f"{L}self_attn.k_proj.bias", f"{L}self_attn.qkv_proj.bias", (1,), "kv_rows"),
        (f"{L}self_attn.v_proj.weight", f"{L}self_attn.qkv_proj.weight", (2,), "kv_rows"),
        (f"{L}self_attn.o_proj.weight", f"{L}self_attn.o_proj.weight", (0,), "columns"),
        (f"{L}self_attn.q_norm.weight", f"{L}self_attn.q_norm.weight", (0,), "whole"),
        (f"{L}mlp.gate_proj.weight", f"{L}mlp.gate_up_proj.weight", (0,), "rows"),
        (f"{L}mlp.up_proj.weight", f"{L}mlp.gate_up_proj.weight", (1,), "rows"),
        (f"{L}mlp.down_proj.weight", f"{L}mlp.down_proj.weight", (0,), "columns"),
        (f"{L}mlp.experts.7.up_proj.weight", f"{L}mlp.experts.w13_weight", (7, 1), "rows"),
        (f"{L}mlp.experts.12.down_proj.weight", f"{L}mlp.experts.w2_weight", (12,), "columns"),
        (f"{L}mlp.gate.weight", f"{L}mlp.gate.weight", (0,), "whole"),
        ("model.embed_tokens.weight", "model.embed_tokens.weight", (0,), "vocabulary"),
        ("lm_head.weight", "lm_head.weight", (0,), "vocabulary"),
        ("model.norm.weight", "model.norm.weight", (0,), "whole"),
    ],
)
def test_where_a_tensor_goes(name: str, held: str, part: tuple[int, ...], kind: str) -> None:
    found = place(name)
    assert (found.held, found.part, found.kind) == (held, part, kind)


def test_experts_are_in_the_order_of_their_numbers() -> None:
    names = [f"{L}mlp.experts.{i}.{part}_proj.weight" for i in (10, 2, 1) for part in ("up", "gate")]
    layout = Layout(names, kv_heads=2, experts=16)
    order = [name.split(".")[5] + name.split(".")[6][0] for name in layout.parts[f"{L}mlp.experts.w13_weight"]]
    assert order == ["1g", "1u", "2g", "2u", "10g", "10u"]


def test_rows_columns_and_shared_heads() -> None:
    names = [f"{L}self_attn.{n}_proj.weight" for n in "qkvo"]
    layout, matrix = Layout(names, kv_heads=1), torch.arange(16.0).view(4, 4)
    assert [layout.slice(names[0], matrix, rank).tolist() for rank in TWO] == [matrix[:2].tolist(), matrix[2:].tolist()]
    assert all(torch.equal(layout.slice(names[1], matrix, rank), matrix) for rank in TWO), "one head, on both"
    assert torch.equal(layout.slice(names[3], matrix, TWO[1]), matrix[:, 2:])
    four = [layout.slice(names[1], matrix, Rank(tensor_rank=r, tensor_size=4)) for r in range(4)]
    assert all(torch.equal(part, matrix) for part in four)
    two_heads = Layout(names, kv_heads=2)
    parts = [two_heads.slice(names[1], matrix, Rank(tensor_rank=r, tensor_size=4)) for r in range(4)]
    assert [part[0, 0].item() for part in parts] == [0, 0, 8, 8]


def test_the_vocabulary_is_filled_up_with_zeros() -> None:
    layout = Layout(["lm_head.weight"], kv_heads=1)
    table = torch.ones(100, 3)
    one = layout.slice("lm_head.weight", table, Rank())
    assert one.shape == (128, 3) and one.sum() == 300 and not one[100:].any()
    parts = [layout.slice("lm_head.weight", table, rank) for rank in TWO]
    assert [len(part) for part in parts] == [64, 64] and parts[1].sum() == 36 * 3
    on_cpu = [layout.slice("lm_head.weight", table, Rank(tensor_rank=r, tensor_size=3, on_cpu=True)) for r in range(3)]
    assert [len(part) for part in on_cpu] == [64, 64, 64], "192 rows: the next multiple that three ranks share"
    assert torch.equal(layout.slice("lm_head.weight", torch.ones(64, 3), Rank()), torch.ones(64, 3))


def test_experts_are_dealt_out() -> None:
    names = [f"{L}mlp.experts.{i}.down_proj.weight" for i in range(4)]
    layout = Layout(names, kv_heads=1, experts=4)
    ranks = [Rank(tensor_rank=r, tensor_size=4, expert_size=2) for r in range(4)]
    assert [[layout.holds(name, rank) for name in names] for rank in ranks] == [
        [True, True, False, False],
        [True, True, False, False],
        [False, False, True, True],
        [False, False, True, True],
    ]
    matrix = torch.arange(8.0).view(2, 4)
    assert [layout.slice(names[0], matrix, rank)[0].tolist() for rank in ranks[:2]] == [[0, 1], [2, 3]]


def test_what_is_known() -> None:
    config = SimpleNamespace(model_type="qwen3", num_key_value_heads=2, intermediate_size=192)
    layout = Layout.of(config, ["model.norm.weight"])
    assert layout is not None and all(map(layout.knows, TWO))
    on_cpu = [Rank(tensor_rank=0, tensor_size=size, on_cpu=True) for size in (1, 2, 4)]
    assert [layout.knows(rank) for rank in on_cpu] == [True, False, False], "192 is no multiple of 128"
    assert Layout.of(SimpleNamespace(model_type="mamba2"), []) is None
