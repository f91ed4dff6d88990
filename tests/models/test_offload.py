"""Memory that goes away and comes back is the same, and whoever holds a tensor need not know."""

from __future__ import annotations

import pytest
import torch

from skyrl_train.models import offload
from skyrl_train.models.offload import Offload, parameters_of, state_of


@pytest.fixture
def trained():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(9, 7), torch.nn.BatchNorm1d(7))
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    net(torch.randn(4, 9)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return net, optimizer


@pytest.mark.parametrize("piece", [64, 100, 1 << 20])
def test_a_round_trip(monkeypatch, trained, piece):
    monkeypatch.setattr(offload, "PIECE", piece)
    net, optimizer = trained
    before = {name: value.clone() for name, value in net.state_dict().items()}
    view = net[0].weight.data[2:4]
    model, moments = Offload(), Offload()
    for _ in range(2):
        moved = model.out(parameters_of(net))
        assert moved == sum(p.nbytes for p in parameters_of(net)) and model.away
        assert model.out(parameters_of(net)) == 0
        assert net[0].weight.untyped_storage().nbytes() == 0
        assert moments.out(state_of(optimizer)) > 0 and moments.back() > 0
        assert model.back() == moved and not model.away and model.back() == 0
        assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert torch.equal(view, before["0.weight"][2:4])


def test_training_goes_on_as_if_nothing_had_been(trained):
    import copy

    net, optimizer = trained
    other = copy.deepcopy(net)
    twin = torch.optim.AdamW(other.parameters(), lr=0.1)
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    store = Offload()
    store.out([*parameters_of(net), *state_of(optimizer)])
    store.back()
    for model, its in ((net, optimizer), (other, twin)):
        model(torch.ones(4, 9)).square().sum().backward()
        its.step()
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))


def test_shared_memory_is_moved_once(trained):
    net, _ = trained
    store = Offload()
    assert store.out([net[0].weight, net[0].weight.data, net[0].weight.T]) == net[0].weight.nbytes
    store.back()


def test_nothing_to_move():
    store = Offload()
    assert store.out([]) == 0 and store.back() == 0 and not store.away
