"""``docs/metrics.md`` names what runs write: nothing more of what algorithms say, and nothing less of anything."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from skyrl_train.algorithms.cases import Subject, random_case
from skyrl_train.algorithms.off_policy import standard
from skyrl_train.algorithms.table import FAMILIES
from skyrl_train.config.algorithm import AlgorithmConfig
from skyrl_train.config.algorithm_sections import OffPolicyCorrectionConfig

from .conftest import World

A = "trainer.algorithm"
PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"
OURS = ("reward", "groups", "advantage", "return", "value", "kl", "policy", "critic", "mismatch", "correction",
        "sampling", "prompts", "trajectories", "response")  # fmt: skip
"""First parts of the names of which every one must be written by a run or a function here."""


def documented() -> set[str]:
    rows = [line.split("|")[1] for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    return {name for row in rows for name in re.findall(r"`([^`]+)`", row)}


def names_of_functions() -> set[str]:
    """Of every policy loss, and of every part of the correction."""
    case, found = random_case(0), set()
    for name in FAMILIES["policy_loss"].functions:
        found |= {f"policy/{m}" for m in Subject("policy_loss", name, AlgorithmConfig()).run(case).metrics}
    bounds = {"token_mask_is_threshold_low": 0.5, "outlier_token_is_threshold_low": 1e-4}
    for section in (
        {"tis_ratio_type": "token", **bounds},
        {"tis_ratio_type": "sequence", "sequence_mask_metric": "product"},
    ):
        config = AlgorithmConfig(off_policy_correction=OffPolicyCorrectionConfig(**section))
        found |= {
            f"correction/{m}"
            for m in standard(case["old_logprobs"], case["rollout_logprobs"], case["mask"], config).metrics
        }
    return found


@pytest.fixture(scope="module")
def written(world: World, tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Names in the metrics of two runs that have everything on between them, and of the functions."""
    folder, steps = tmp_path_factory.mktemp("metrics"), "trainer.max_steps=1"
    critic = (
        f"{A}.advantage_estimator=gae", f"trainer.critic.model.path={world.model}",
        "trainer.critic_mini_batch_size=2", f"{A}.use_kl_in_reward=true", f"{A}.zero_variance_filter=true",
        f"{A}.off_policy_correction.tis_ratio_type=token", "trainer.eval_interval=1",
    )  # fmt: skip
    replaced = (f"{A}.use_kl_loss=true", f"{A}.dynamic_sampling.type=replace")
    runs = [world.train(folder / str(i), *more, steps) for i, more in enumerate((critic, replaced))]
    return {name for run in runs for line in run.history for name in line} | names_of_functions()


def test_what_is_written_is_on_the_page(written):
    patterns = [
        re.compile(re.sub(r"<\w+>", ".+", re.escape(name).replace(r"\<", "<").replace(r"\>", ">")))
        for name in documented()
    ]
    unknown = {name for name in written - {"step", "time"} if not any(p.fullmatch(name) for p in patterns)}
    assert unknown == set()


def test_what_is_on_the_page_is_written(written):
    promised = {name for name in documented() if name.split("/")[0] in OURS and "<" not in name}
    assert len(promised) > 80 and promised - written == set()
