"""Files, folders and packages that a config names and this machine does not have."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from skyrl_train.config import machine
from skyrl_train.config.load import from_mapping
from skyrl_train.config.machine import check_machine
from skyrl_train.config.schema import Config
from skyrl_train.errors import ConfigError, MissingPackageError


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "rows.parquet").write_text("")
    return from_mapping({
        "trainer": {"policy": {"model": {"path": str(tmp_path / "model")}}},
        "data": {"train_data": str(tmp_path / "rows.parquet"), "val_data": [str(tmp_path / "*.parquet"), "org/data"]},
    })  # fmt: skip


def test_what_is_there_passes(config: Config) -> None:
    check_machine(config)
    config.trainer.policy.model.path = config.trainer.ref.model.path = "org/model"  # may be on the hub
    check_machine(config)


def test_absent_data(config: Config, tmp_path: Path) -> None:
    config.data.train_data = [str(tmp_path / "no.parquet")]
    with pytest.raises(ConfigError, match=r"data.train_data=.*no such file.*skyrl data"):
        check_machine(config)
    check_machine(config, "generate")
    config.data.train_data, config.data.val_data = [str(tmp_path / "rows.parquet")], ["no.jsonl"]
    with pytest.raises(ConfigError, match=r"data.val_data=.*eval_interval=-1"):
        check_machine(config)
    config.trainer.eval_interval, config.trainer.eval_before_train = -1, False
    check_machine(config)


@pytest.mark.parametrize("path", ["/no/such/model", "./no", "~/no", "outputs/quickstart/model"])
def test_absent_model_folders(config: Config, path: str) -> None:
    config.trainer.policy.model.path = path
    with pytest.raises(ConfigError, match=r"policy.model.path=.*no such folder.*skyrl warmup"):
        check_machine(config)


def test_a_folder_that_is_no_model(config: Config, tmp_path: Path) -> None:
    config.trainer.ref.model.path = str(tmp_path)
    with pytest.raises(ConfigError, match=r"trainer.ref.model.path=.*config.json"):
        check_machine(config)


def test_absent_packages(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "find_spec", lambda name: None)
    check_machine(config)
    config.trainer.logger = ["console", "wandb"]
    with pytest.raises(MissingPackageError, match=r'trainer.logger=wandb.*pip install "skyrl-train\[wandb\]"'):
        check_machine(config)
    config.trainer.logger = "console"
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    with pytest.raises(MissingPackageError, match="ray"):
        check_machine(config)
    config.trainer.placement.runtime = "local"
    check_machine(config)


def test_sglang_must_be_somewhere(config: Config, tmp_path: Path) -> None:
    config.generator.backend = "sglang"
    if find_spec("sglang") is None:
        with pytest.raises(
            MissingPackageError, match=r"No module named 'sglang'.*uv sync --extra sglang.*engine_python"
        ):
            check_machine(config)
    config.generator.engine_python = "/elsewhere/bin/python"
    check_machine(config)
    config.generator.engine_python, config.generator.run_engines_locally = None, False
    check_machine(config)
