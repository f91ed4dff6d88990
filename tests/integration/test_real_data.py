"""Ten training steps on real data: gsm8k, countdown and text2sql, from the raw files to the last update."""

import json
from pathlib import Path

import pytest

from skyrl_train.build import train
from skyrl_train.config.door import load_config
from skyrl_train.data.prepare import prepare_data
from skyrl_train.entrypoints.cli import main as skyrl

RAW = Path(__file__).parents[2].parent / "shared" / "data"
FATES = ("finished", "truncated", "filtered", "stale", "failed")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A byte-level model that saw a few worked GSM8K answers: any text can be asked and said."""
    if not (RAW / "gsm8k").is_dir():
        pytest.skip("the raw data sets are not beside the repository")
    folder = tmp_path_factory.mktemp("real")
    prepare_data("gsm8k", folder / "gsm8k", raw=RAW / "gsm8k", limit=64)
    options = ["--tokenizer", "byte", "--steps", "4", "--batch-size", "4", "--eval-rows", "4", "--threads", "1"]
    assert skyrl(["warmup", "--data", str(folder / "gsm8k"), "--out", str(folder / "model"), *options]) == 0
    return folder / "model"


@pytest.mark.parametrize(("task", "turns"), [("gsm8k", 1), ("countdown", 1), ("text2sql", 3)])
def test_ten_steps_on_real_data(task, turns, model, tmp_path):
    raw = RAW / task
    if not raw.is_dir():
        pytest.skip(f"the raw files of {task} are not beside the repository")
    files = prepare_data(task, tmp_path / task, raw=raw, limit=400)
    overrides = [
        f"data.train_data=[{files['train']}]",
        "data.val_data=[]",
        f"trainer.policy.model.path={model}",
        f"environment.env_class={task}",
        f"generator.max_turns={turns}",
        "generator.n_samples_per_prompt=2",
        "generator.sampling_params.max_generate_length=16",
        "generator.max_input_length=2000",
        "trainer.max_prompt_length=1900",
        "trainer.train_batch_size=4",
        "trainer.policy_mini_batch_size=2",
        "trainer.max_steps=10",
        "trainer.eval_interval=-1",
        "trainer.ckpt_interval=-1",
        "trainer.resume_mode=none",
        "trainer.num_threads=1",
    ]
    if task == "text2sql":
        overrides.append(f"environment.skyrl_gym.text2sql.db_path={tmp_path / task / 'databases'}")
    train(load_config(overrides), tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 11))
    for row in rows:
        assert sum(row[f"trajectories/{fate}"] for fate in FATES) == row["trajectories/started"] == 8
        assert row["prompts/used"] + row["prompts/lost"] == row["prompts/started"] == 4
        assert row["trajectories/failed"] == 0
