"""The entropy bonus."""

import pytest
import torch

from skyrl_train.algorithms.entropy import entropy_loss
from skyrl_train.algorithms.tensors import TensorError

from .helpers import BAD

MASK = torch.tensor([[True, True, True], [True, False, False]])


@pytest.mark.parametrize("bad", BAD)
def test_worked_on_paper(bad):
    entropy = torch.tensor([[0.5, 1.0, 2.0], [0.25, bad, bad]], dtype=torch.float64, requires_grad=True)
    loss = entropy_loss(entropy, MASK)
    assert loss.tolist() == [[-0.5, -1.0, -2.0], [-0.25, 0.0, 0.0]]
    loss.sum().backward()
    assert entropy.grad is not None
    assert entropy.grad.tolist() == [[-1, -1, -1], [-1, 0, 0]]


def test_stepping_down_the_loss_widens_the_distribution():
    logits = torch.tensor([2.0, 0.0, -1.0], dtype=torch.float64, requires_grad=True)

    def entropy(x):
        return torch.distributions.Categorical(logits=x).entropy().reshape(1, 1)

    entropy_loss(entropy(logits), torch.tensor([[True]])).sum().backward()
    assert entropy(logits - 0.1 * logits.grad).item() > entropy(logits).item()


def test_errors_name_the_tensor():
    with pytest.raises(TensorError, match=r"^entropy: shape \[2\]"):
        entropy_loss(torch.zeros(2), MASK)
