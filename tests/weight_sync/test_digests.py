"""Digests as SGLang's checker computes them, and their way through buckets."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch

from skyrl_train.weight_sync.digests import Digester, digest, finish, tiles
from skyrl_train.weight_sync.layout import Layout, Rank

GOLDEN = {  # what the server's own kernel answers for these tensors
    "five": (torch.arange(5, dtype=torch.float32), "39495f3157dc4183"),
    "odd bytes": (torch.arange(21, dtype=torch.float32).to(torch.bfloat16), "46fc383677b8c1f1"),
    "two runs": (torch.arange(20_000, dtype=torch.float32).to(torch.bfloat16), "b32c7f9d9c9702a1"),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_the_digest_of_a_gpu_is_the_servers(name: str) -> None:
    tensor, wanted = GOLDEN[name]
    assert digest(tensor, "tiles") == wanted


def test_the_digest_of_a_cpu() -> None:
    tensor = torch.arange(6, dtype=torch.bfloat16).view(2, 3)
    raw = bytes(tensor.view(torch.int16).numpy().tobytes())
    assert digest(tensor, "sha256") == hashlib.sha256(raw).hexdigest()[:16]
    assert digest(tensor.T, "sha256") != digest(tensor, "sha256"), "the order of the elements counts, not the memory"


@pytest.mark.parametrize("kind", ["sha256", "tiles"])
def test_one_unit_in_the_last_place_changes_it(kind) -> None:
    tensor = torch.randn(300, 7).to(torch.bfloat16)
    other = tensor.clone()
    other.view(torch.int16)[123, 4] += 1
    assert digest(tensor, kind) != digest(other, kind)


def test_several_at_once() -> None:
    tensors = [torch.randn(n) for n in (1, 50, 9000)]
    assert finish(tiles(tensors)) == [digest(t, "tiles") for t in tensors]


def test_neighbours_in_memory_that_are_not_of_one_bucket() -> None:
    """As a copy of what waits may happen to lie before the next bucket."""
    memory = np.arange(16, dtype=np.float32)
    gate, up = torch.from_numpy(memory[:8]).view(2, 4), torch.from_numpy(memory[8:]).view(2, 4)
    assert gate.data_ptr() + gate.nbytes == up.data_ptr()
    names = [f"model.layers.0.mlp.{part}_proj.weight" for part in ("gate", "up")]
    digester = Digester(Layout(names, kv_heads=1), [Rank()], "sha256")
    digester.add(zip(names, (gate, up), strict=True))
    found = digester.result()[Rank()]["model.layers.0.mlp.gate_up_proj.weight"]
    assert found == digest(torch.from_numpy(memory), "sha256")


@pytest.mark.parametrize("kind", ["sha256", "tiles"])
def test_parts_that_come_in_different_buckets(kind) -> None:
    q, k, v = (torch.randn(4, 4) for _ in range(3))
    names = [f"model.layers.0.self_attn.{n}_proj.weight" for n in "qkv"]
    ranks = [Rank(tensor_rank=r, tensor_size=2) for r in (0, 1)]
    digester = Digester(Layout(names, kv_heads=2), ranks, kind)
    digester.add([(names[2], v), (names[0], q)])
    wanted = [torch.cat([q[2 * r : 2 * r + 2], k[2 * r : 2 * r + 2], v[2 * r : 2 * r + 2]]) for r in (0, 1)]
    v.zero_(), q.zero_()  # the bucket is used again
    digester.add([(names[1], k)])
    held = "model.layers.0.self_attn.qkv_proj.weight"
    assert digester.result() == {rank: {held: digest(want, kind)} for rank, want in zip(ranks, wanted, strict=True)}
