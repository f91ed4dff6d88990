"""Each folder of ``examples/`` with a config: it passes preflight as it is, is listed, and trains."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from skyrl_train.config.door import load_config
from skyrl_train.config.preflight import preflight

EXAMPLES = Path(__file__).parents[1] / "examples"
NAMES = sorted(path.parent.name for path in EXAMPLES.glob("*/*.yaml"))
LEARNED = {  # what of each the metrics of a step tell
    "cispo": "policy/clip_fraction_high",
    "custom_loss": "policy/far_fraction",
    "dapo": "sampling/rounds",
    "dr_grpo": "policy/denominator",
    "gspo": "policy/clip_fraction_low",
    "ppo_critic": "value/explained_variance",
    "rloo": "kl/reward_mean",
    "tis": "correction/capped_tokens",
}


@pytest.mark.parametrize("name", NAMES)
def test_it_passes_preflight_without_a_warning_and_is_listed(name: str) -> None:
    config = load_config([], EXAMPLES / name, name)
    assert preflight(config) == []
    assert config.trainer.ckpt_path == f"outputs/examples/{name}/checkpoints" and config.trainer.run_name == name
    assert f"`bash examples/run.sh {name}`" in (EXAMPLES / "README.md").read_text()
    assert f"bash examples/run.sh {name}\n" in (EXAMPLES / name / f"{name}.yaml").read_text()


def test_none_is_forgotten() -> None:
    assert set(LEARNED) == set(NAMES)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_its_command_trains(name: str, tmp_path: Path) -> None:
    """By the command that the file names, so with the quickstart's task and model, made where they are absent."""
    changed = ["trainer.max_steps=3", "trainer.eval_interval=-1", "trainer.eval_before_train=false",
               "trainer.num_threads=1", "trainer.ckpt_interval=-1", "trainer.hf_save_interval=-1"]  # fmt: skip
    command = ["bash", str(EXAMPLES / "run.sh"), name, *changed]
    environment = os.environ | {"RUN_FOLDER": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    steps = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == [1, 2, 3]
    for step in steps:
        assert step["policy/grad_norm"] > 0 and step["policy/skipped_updates_total"] == 0
        assert LEARNED[name] in step
