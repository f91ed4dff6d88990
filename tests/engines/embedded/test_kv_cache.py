"""The cache: growth keeps what is stored, moves take whole rows, memory has its bounds."""

import pytest
import torch

from skyrl_train.engines.embedded.kv_cache import KVCache, row_vectors


def filled(rows=3, length=5, max_rows=8, max_length=200):
    cache = KVCache(max_rows, max_length)
    cache.reserve(rows, length)
    store = cache.layer(0, torch.zeros(1, 2, 1, 4), torch.zeros(1, 2, 1, 6))
    for row in range(rows):
        store.keys[row], store.values[row] = row + 1, -(row + 1)
    return cache


def layer(cache):
    return cache.layer(0, torch.empty(0), torch.empty(0))


def test_growth_keeps_what_is_stored_and_clears_the_rest():
    cache = filled()
    before = layer(cache)
    cache.reserve(7, 100)
    after = layer(cache)
    assert after.keys.shape == (7, 2, 128, 4) and after.values.shape == (7, 2, 128, 6)
    assert torch.equal(after.keys[:3, :, :64], before.keys) and torch.equal(after.values[:3, :, :64], before.values)
    assert not after.keys[3:].any() and not after.keys[:, :, 64:].any()


def test_size_doubles_up_to_its_bounds():
    cache = filled()
    cache.reserve(4, 65)
    assert (cache.rows, cache.length) == (6, 128)
    cache.reserve(8, 200)
    assert (cache.rows, cache.length) == (8, 200)
    assert cache.nbytes == 8 * 200 * 2 * (4 + 6) * 4


@pytest.mark.parametrize(("source", "target"), [([2], [0]), ([2, 1], [0, 3]), ([], [])])
def test_moves(source, target):
    cache = filled(rows=4)
    expected = [1.0, 2.0, 3.0, 4.0]
    for s, t in zip(source, target, strict=True):
        expected[t] = float(s + 1)
    cache.move(source, target, 5)
    assert layer(cache).keys[:, 0, 0, 0].tolist() == expected
    assert layer(cache).values[:, 1, 4, 5].tolist() == [-e for e in expected]
    assert layer(cache).keys[:, 0, 5, 0].tolist() == [1.0, 2.0, 3.0, 4.0]  # beyond the length nothing is copied


def test_wiping_and_releasing():
    cache = filled()
    cache.wipe([1])
    assert layer(cache).keys[:, 0, 0, 0].tolist() == [1.0, 0.0, 3.0]
    cache.release()
    assert cache.nbytes == 0 and (cache.rows, cache.length) == (3, 64)


def test_row_vectors_find_every_head_of_a_row_at_its_position():
    cache = filled()
    store = layer(cache)
    at = row_vectors(3, 2, cache.length, torch.tensor([0, 9, 63]))
    store.flat_keys[at] = 50.0
    found = (store.keys == 50).all(-1).nonzero().tolist()
    assert found == [[row, head, place] for row, place in enumerate([0, 9, 63]) for head in (0, 1)]
