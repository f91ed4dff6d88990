"""Off-policy correction, each part on paper, and their order."""

import math

import pytest
import torch

from skyrl_train.algorithms.off_policy import standard
from skyrl_train.config.algorithm import AlgorithmConfig
from skyrl_train.config.algorithm_sections import OffPolicyCorrectionConfig

ROLLOUT = torch.full((2, 3), -1.0)
RATIO = torch.tensor([[1.0, 3.0, 0.5], [1.1, 1.0, 99.0]])
OLD = ROLLOUT + RATIO.log()
MASK = torch.tensor([[True, True, True], [True, True, False]])
# On paper: products 1.5 and 1.1; geometric means 1.5^(1/3) = 1.1447 and 1.1^(1/2) = 1.0488


def correct(old=OLD, rollout=ROLLOUT, mask=MASK, **section):
    result = standard(old, rollout, mask, AlgorithmConfig(off_policy_correction=OffPolicyCorrectionConfig(**section)))
    return result.weights.tolist(), {name: value.item() for name, value in result.metrics.items()}


def near(rows):
    return [[pytest.approx(x, rel=1e-5) for x in row] for row in rows]


def test_nothing_is_corrected_by_default():
    weights, metrics = correct()
    assert weights == [[1, 1, 1], [1, 1, 0]]
    mean = (1 + 3 + 0.5 + 1.1 + 1) / 5
    assert metrics["ratio_mean"] == pytest.approx(mean)
    assert metrics["ratio_std"] == pytest.approx(math.sqrt(sum((r - mean) ** 2 for r in (1, 3, 0.5, 1.1, 1)) / 5))
    assert (metrics["ratio_min"], metrics["ratio_max"]) == pytest.approx((0.5, 3))
    assert metrics["kept_fraction"] == 1


def test_token_truncation():
    weights, metrics = correct(tis_ratio_type="token")  # cap 2
    assert weights == near([[1, 2, 0.5], [1.1, 1, 0]])
    assert metrics["capped_tokens"] == pytest.approx(1 / 5)


def test_sequence_truncation():
    weights, metrics = correct(tis_ratio_type="sequence", sequence_tis_ratio_clip_high=1.2)
    assert weights == near([[1.2] * 3, [1.1, 1.1, 0]])
    assert metrics["capped_sequences"] == 0.5


@pytest.mark.parametrize(
    ("section", "kept", "low", "high"),
    [
        ({"geo_mask_low": 0.9, "geo_mask_high": 1.1}, [False, True], 0, 0.5),
        ({"geo_mask_low": 1.1, "geo_mask_high": 1.2}, [True, False], 0.5, 0),
        ({"geo_mask_low": 0.9, "geo_mask_high": 1.2}, [True, True], 0, 0),
        ({}, [False, False], 0, 1),  # 0.99 to 1.01
    ],
)
def test_sequences_by_their_geometric_mean(section, kept, low, high):
    weights, metrics = correct(sequence_mask_metric="geometric", **section)
    assert [row[0] == 1 for row in weights] == kept
    assert (metrics["masked_sequences_low"], metrics["masked_sequences_high"]) == (low, high)
    assert metrics["masked_sequences"] == low + high


@pytest.mark.parametrize(("low", "high", "kept"), [(0.5, 2.0, [True, True]), (0.5, 1.2, [False, True]),
                                                   (1.2, 2.0, [True, False])])  # fmt: skip
def test_sequences_by_their_product(low, high, kept):
    weights, _ = correct(sequence_mask_metric="product", product_mask_low=low, product_mask_high=high)
    assert [row[0] == 1 for row in weights] == kept


@pytest.mark.parametrize(
    ("low", "high", "want"),
    [
        (0.6, None, [[1, 1, 0], [1, 1, 0]]),
        (None, 2.0, [[1, 0, 1], [1, 1, 0]]),
        (0.6, 2.0, [[1, 0, 0], [1, 1, 0]]),
        (0.5, 3.1, [[1, 1, 1], [1, 1, 0]]),
    ],
)
def test_tokens_outside_of_bounds(low, high, want):
    weights, metrics = correct(token_mask_is_threshold_low=low, token_mask_is_threshold_high=high)
    assert weights == want
    assert metrics["kept_fraction"] == pytest.approx(sum(map(sum, want)) / 5)


def test_icepop_is_the_token_mask_with_token_truncation():
    weights, _ = correct(
        token_mask_is_threshold_low=0.6, token_mask_is_threshold_high=5.0, tis_ratio_type="token",
        token_tis_ratio_clip_high=5.0,
    )  # fmt: skip
    assert weights == near([[1, 3, 0], [1.1, 1, 0]])


@pytest.mark.parametrize(("low", "high", "kept", "metrics"), [
    (1e-4, 2.0, [False, True], (0, 0.5)), (0.6, 100.0, [False, True], (0.5, 0)), (1e-4, 100.0, [True, True], (0, 0)),
    (None, 2.0, [False, True], (0, 0.5)), (0.6, None, [False, True], (0.5, 0)),
])  # fmt: skip
def test_sequences_with_an_outlier(low, high, kept, metrics):
    """The masked token's 99 is none."""
    weights, found = correct(outlier_token_is_threshold_low=low, outlier_token_is_threshold_high=high)
    assert [row[0] == 1 for row in weights] == kept
    assert (found["outlier_sequences_low"], found["outlier_sequences_high"]) == metrics


def test_each_part_sees_what_those_before_have_left():
    # without the token of ratio 3, the first sequence's product is 0.5: under the cap, and out of the sequence mask
    weights, metrics = correct(
        token_mask_is_threshold_high=2.0,
        tis_ratio_type="sequence",
        sequence_mask_metric="product",
        product_mask_low=0.6,
    )
    assert weights == near([[0, 0, 0], [1.1, 1.1, 0]])
    assert metrics["capped_sequences"] == 0 and metrics["masked_sequences_low"] == 0.5


def test_a_huge_ratio_stays_finite():
    weights, metrics = correct(old=torch.zeros(2, 3), rollout=torch.full((2, 3), -500.0), tis_ratio_type="sequence")
    assert weights[0][0] == 5.0 and math.isfinite(metrics["ratio_max"])
