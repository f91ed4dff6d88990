"""What the learning curves of every algorithm are of: every estimator and every loss, in configs that can run."""

from __future__ import annotations

from pathlib import Path

import pytest

from skyrl_train.config.algorithm import ESTIMATORS, LOSSES
from skyrl_train.config.door import load_config
from skyrl_train.config.preflight import preflight


def test_every_variant_passes_preflight_and_none_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))
    from benchmarks.algorithm_curves import slug
    from benchmarks.algorithm_variants import MAIN, VARIANTS

    assert len({slug(name) for name in VARIANTS}) == len(VARIANTS)  # a folder each
    estimators, losses = set(), set()
    for name, variant in VARIANTS.items():
        overrides = [text.format(model="org/model") for text in variant.overrides]
        config = load_config(["+experiment=quickstart", *overrides])
        assert preflight(config) == [], name
        estimators.add(config.trainer.algorithm.advantage_estimator)
        losses.add(config.trainer.algorithm.policy_loss_type)
    assert (estimators, losses) == (set(ESTIMATORS), set(LOSSES)) and set(MAIN) <= set(VARIANTS)
