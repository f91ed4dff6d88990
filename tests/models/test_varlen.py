"""The GPU's way of packed attention, with its kernel written out in plain PyTorch; the kernel itself: test_gpu.py."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from skyrl_train.models.packing import pack
from skyrl_train.models.varlen import Run, VarlenPlan

tokens = st.lists(st.integers(2, 9), min_size=1, max_size=40)
sequences = st.lists(st.tuples(st.integers(0, 2), st.lists(st.integers(2, 9), max_size=40)), min_size=1, max_size=9)


def plain_kernel(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, *, scale: float,
    window: int | None,
) -> Tensor:  # fmt: skip
    """What the kernel is documented to do: causal within each sequence, aligned at the end."""
    outputs = []
    for i in range(len(cu_q) - 1):
        mine, seen = slice(int(cu_q[i]), int(cu_q[i + 1])), slice(int(cu_k[i]), int(cu_k[i + 1]))
        rows, columns = mine.stop - mine.start, seen.stop - seen.start
        assert rows <= max_q and columns <= max_k
        before = torch.arange(rows)[:, None] + columns - rows - torch.arange(columns)
        visible = (before >= 0) & (before < (window or columns + 1))
        keys, values = (x[seen].repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        scores = torch.einsum("ihd,jhd->hij", q[mine], keys) * scale
        outputs.append(torch.einsum("hij,jhd->ihd", scores.masked_fill(~visible, -torch.inf).softmax(-1), values))
    return torch.cat(outputs)


@settings(max_examples=60, deadline=None)
@given(st.lists(tokens, min_size=3, max_size=3), sequences, st.booleans(), st.sampled_from([None, 7]),
       st.sampled_from([12, 4096]))  # fmt: skip
def test_it_is_the_attention_of_blocks_and_so_are_its_gradients(heads, rows, share, window, long):
    prompts, responses = [heads[i] for i, _ in rows], [r for _, r in rows]
    packed = pack(prompts, responses, share_prompts=share)
    total = packed.input_ids.shape[1]
    draw = torch.Generator().manual_seed(total)
    shape = [(1, h, total, 4) for h in (4, 2, 2)]
    inputs = [torch.randn(s, generator=draw, dtype=torch.float64).requires_grad_() for s in shape]
    runs = [Run(s.start, s.length, s.prefix) for s in packed.plan._segments]
    plan = VarlenPlan(runs, "cpu", plain_kernel, long=long)
    expected = packed.plan.attend(0, *inputs, scale=0.3, window=window)
    got = plan.attend(*inputs, scale=0.3, window=window)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    pull = torch.randn(got.shape, generator=draw, dtype=torch.float64)
    for mine, theirs in zip(
        torch.autograd.grad((got * pull).sum(), inputs), torch.autograd.grad((expected * pull).sum(), inputs),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_keys_are_gathered_only_for_prompts_that_are_shared():
    def parts(prompts, responses, long=4096):
        packed = pack(prompts, responses)
        runs = [Run(s.start, s.length, s.prefix) for s in packed.plan._segments]
        return VarlenPlan(runs, "cpu", plain_kernel, long=long)._parts

    (alone,) = parts([[1, 2], [3]], [[4, 5], [6]])
    assert alone.keys is None and alone.cu_q.tolist() == alone.cu_k.tolist() == [0, 4, 6]
    (shared,) = parts([[1, 2], [1, 2]], [[4, 5], [6, 7, 8]])
    assert shared.cu_q.tolist() == [0, 4, 7] and shared.cu_k.tolist() == [0, 4, 9]
    assert shared.keys.tolist() == [0, 1, 2, 3, 0, 1, 4, 5, 6]
    names = [type(p).__name__ for p in parts([[1], [2] * 9, [3]], [[4], [5] * 9, [6]], long=8)]
    assert names == ["_Short", "_Dense", "_Short"]


@pytest.mark.parametrize("length", [1, 7])
def test_one_sequence(length):
    packed = pack([[1]], [[2] * length])
    assert [(s.start, s.length) for s in packed.plan._segments] == [(0, 1), (1, length)]
