"""``docs/extending.md``: its signatures are the table's, its examples work and keep the contract."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from skyrl_train.algorithms.properties import broken, check
from skyrl_train.algorithms.table import FAMILIES
from skyrl_train.config.algorithm import ESTIMATORS, KL_ESTIMATORS, LOSSES, REDUCTIONS

PAGE = (Path(__file__).parents[2] / "docs" / "extending.md").read_text()
THE_TEST, MODULE, NUMBERS = re.findall(r"```python\n(.*?)```", PAGE, re.S)
EXAMPLES = {
    "advantage_estimator": "sign", "policy_loss": "trust", "value_loss": "huber", "kl_estimator": "chi_square",
    "loss_reduction": "root_length", "off_policy_correction": "both_sides", "reward_shaping": "toll",
}  # fmt: skip


@pytest.fixture
def my_pkg(tmp_path, monkeypatch):
    """The page's module, to be imported."""
    (tmp_path / "my_pkg").mkdir()
    (tmp_path / "my_pkg" / "losses.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "my_pkg.losses"
    for name in ("my_pkg", "my_pkg.losses"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("family", FAMILIES)
def test_its_table_is_the_table(family):
    key = FAMILIES[family].key.removeprefix("trainer.algorithm.")
    assert f"| `{family}` | `{key}` | `{FAMILIES[family].signature}` |" in PAGE
    for parameter in FAMILIES[family].optional:
        assert f"| `{family}` | `{parameter}` |" in PAGE


@pytest.mark.parametrize("family", FAMILIES)
def test_its_examples_keep_the_contract(family, my_pkg):
    name = f"{my_pkg}:{EXAMPLES[family]}"
    assert broken(family, name) == [] and len(check(family, name)) > 5


def test_its_numbers(my_pkg):
    exec(compile(NUMBERS, "docs/extending.md", "exec"), {})


def test_its_test(my_pkg):
    space: dict = {}
    exec(compile(THE_TEST, "docs/extending.md", "exec"), space)
    space["test_trust"]()


ALGORITHMS = (Path(__file__).parents[2] / "docs" / "algorithms.md").read_text()


@pytest.mark.parametrize("name", [*ESTIMATORS, *LOSSES, *KL_ESTIMATORS, *REDUCTIONS])
def test_the_page_on_algorithms_has_every_name(name):
    assert any(f"`{name}`" in line.split("|")[1] for line in ALGORITHMS.splitlines() if line.startswith("| `"))
