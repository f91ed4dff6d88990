"""A policy loss of one's own: no clip, and a pull back that grows with the square of the distance.

Try its contract:  skyrl check policy_loss examples.custom_loss.trust:trust
"""

from skyrl_train.algorithms.losses import PolicyLoss
from skyrl_train.algorithms.tensors import masked_mean

STRENGTH = 0.5
FAR = 0.2


def trust(logprobs, old_logprobs, advantages, mask, config, rollout_logprobs=None):
    """``-r A + STRENGTH (log r)^2`` for every token, with ``r = exp(logprobs - old_logprobs)``.

    Metric ``far_fraction``, logged as ``policy/far_fraction``: tokens whose log ratio is beyond ``FAR``.
    """
    distance = logprobs - old_logprobs
    per_token = -distance.exp() * advantages + STRENGTH * distance.square()
    far = masked_mean((distance.detach().abs() > FAR).float(), mask)
    return PolicyLoss(per_token=per_token, metrics={"far_fraction": far})
