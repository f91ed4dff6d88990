"""The reference is the tree: printed, and committed as a page."""

from __future__ import annotations

import pytest

from config.conftest import ROOT
from skyrl_train.config.reference import markdown, table
from skyrl_train.config.schema import tree
from skyrl_train.errors import ConfigError


def test_the_committed_page_is_the_tree() -> None:
    page = (ROOT / "docs" / "config.md").read_text()
    assert page == markdown(), "run: python -m skyrl_train.config.reference > docs/config.md"


def test_every_key_has_its_row() -> None:
    page = markdown()
    for name in tree():
        assert page.count(f"| `{name}` | ") >= 1, name


def test_the_table_shows_every_key_or_those_asked_for() -> None:
    whole = table()
    assert all(f"{name}=" in whole for name in tree())
    assert "trainer.algorithm.eps_clip_low=0.2  (number)" in table("eps_clip")
    assert "trainer.seed" not in table("eps_clip")
    with pytest.raises(ConfigError, match=r"trainer\.policy\.optimizer_config\.lr"):
        table("learning_rate")


def test_limits_and_capabilities_are_in_the_help() -> None:
    assert "(grpo, dr_grpo, rloo, " in table("trainer.algorithm.advantage_estimator")
    assert "module:name)" in table("trainer.algorithm.advantage_estimator")
    text = " ".join(table("trainer.strategy").split())
    assert "(fsdp2, fsdp, megatron)" in text and "Accepted now: fsdp2 or fsdp; the rest needs" in text
    text = " ".join(table("trainer.algorithm.gamma").split())
    assert "Has effect with trainer.algorithm.advantage_estimator=gae or reinforce++." in text
    assert "Above 0 and at most 1. For sglang or vllm engines." in " ".join(table("gpu_memory_utilization").split())
