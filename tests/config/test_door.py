"""The command line: every way to give a key, the real command's errors and speed, the run folder."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from config.conftest import GOOD, ROOT
from skyrl_train.config import door
from skyrl_train.config.door import load_config, make_run_folder, parse_arguments, resolve_run_dir
from skyrl_train.config.load import from_mapping
from skyrl_train.config.schema import Config
from skyrl_train.errors import ConfigError, InvariantError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "mine.yaml").write_text("trainer:\n  seed: 5\n  epochs: 2\ngenerator:\n  max_turns: 3\ndata:\n")
    (tmp_path / "old.yaml").write_text("defaults:\n  - ppo_base_config\n  - _self_\ntrainer:\n  seed: 8\n")
    (tmp_path / "experiment" / "plain.yaml").write_text("trainer:\n  seed: 6\n")
    (tmp_path / "experiment" / "packaged.yaml").write_text("# @package _global_\ntrainer:\n  seed: 7\n")
    return tmp_path


@pytest.mark.parametrize("plus", ["", "+", "++"])
def test_open_sections_take_any_key(plus: str) -> None:
    config = load_config([
        f"{plus}generator.engine_init_kwargs.attention_backend=flashinfer",
        f"{plus}generator.engine_init_kwargs.nested.depth=2",
        f"{plus}generator.chat_template_kwargs.enable_thinking=false",
        f"{plus}trainer.policy.model_config_kwargs.attention_dropout=0.1",
        f"{plus}environment.skyrl_gym.gsm8k.method=flexible",
        f"{plus}trainer.seed=9",
    ])  # fmt: skip
    assert config.generator.engine_init_kwargs == {"attention_backend": "flashinfer", "nested": {"depth": 2}}
    assert config.generator.chat_template_kwargs == {"enable_thinking": False}
    assert config.trainer.policy.model_config_kwargs == {"attention_dropout": 0.1}
    assert config.environment.skyrl_gym.settings("gsm8k") == {"method": "flexible"}
    assert config.trainer.seed == 9


def test_precedence_is_defaults_file_experiment_command_line(folder: Path) -> None:
    config = load_config(["+experiment=plain", "trainer.epochs=4"], folder, "mine")
    assert (config.trainer.seed, config.trainer.epochs, config.generator.max_turns) == (6, 4, 3)
    assert config.trainer.train_batch_size == 1024
    assert load_config([], folder, "mine.yaml").trainer.seed == 5
    assert load_config(["experiment=packaged"], folder).trainer.seed == 7


def test_our_own_experiments_are_found_without_a_folder() -> None:
    for path in sorted(door.EXPERIMENTS.glob("*.yaml")):
        given = yaml.safe_load(path.read_text())
        assert load_config([f"+experiment={path.stem}"]) == from_mapping(given)


def test_files_that_name_the_public_base_config_load(folder: Path) -> None:
    assert load_config([], folder, "old").trainer.seed == 8


def test_a_file_of_users_groups(folder: Path) -> None:
    (folder / "cluster").mkdir()
    (folder / "cluster" / "big.yaml").write_text("# @package _global_\ntrainer:\n  train_batch_size: 64\n")
    assert load_config(["cluster=big"], folder).trainer.train_batch_size == 64


def test_lists_mappings_and_interpolations_on_the_command_line() -> None:
    config = load_config([
        "data.train_data=[a.parquet,b.parquet]", "trainer.rope_scaling={rope_type: yarn, factor: 4.0}",
        "trainer.run_name=seed${trainer.seed}", "generator.sampling_params.stop=['</a>','b']",
        "trainer.policy.optimizer_config.lr=2e-5", "generator.sampling_params.logit_bias={7: -1.5}",
    ])  # fmt: skip
    assert config.data.train_data == ["a.parquet", "b.parquet"]
    assert config.trainer.rope_scaling == {"rope_type": "yarn", "factor": 4.0}
    assert config.trainer.run_name == "seed42"
    assert config.generator.sampling_params.stop == ["</a>", "b"]
    assert config.trainer.policy.optimizer_config.lr == 2e-5
    assert config.generator.sampling_params.logit_bias == {7: -1.5}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["trainer.seed"], "KEY=VALUE"),
        (["trainer.seed=[1"], "cannot be read as an override"),
        (["trainer.seed=1,2"], "trainer.seed=[a,b]"),
        (["~trainer.seed"], "does not exist"),
        (["hydra.job.chdir=true"], "hydra.run.dir"),
        (["hydra.verbose=true"], "SKYRL_LOG_LEVEL"),
        (["hydra/launcher=submitit"], "hydra.run.dir"),
        (["+experiment=nope"], "there is no such experiment. There is guess, packaged, plain or quickstart"),
        (["sed=1"], "trainer.seed"),
        (["trainer.run_name=${oc.env:NO_SUCH_VARIABLE}"], "NO_SUCH_VARIABLE"),
        (["trainer.run_name='${'"], "cannot be"),
    ],
)
def test_what_cannot_be_read(given: list[str], words: str, folder: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(given, folder)
    assert words in str(caught.value)


def test_files_that_cannot_be_read(folder: Path) -> None:
    (folder / "broken.yaml").write_text("trainer: [\nb: :")
    (folder / "text.yaml").write_text("just words")
    (folder / "dotted.yaml").write_text("trainer.seed: 1\n")
    (folder / "twice.yaml").write_text("trainer:\n  seed: 1\ntrainer:\n  seed: 2\n")
    with pytest.raises(ConfigError, match=r"broken.yaml, line 2"):
        load_config([], folder, "broken")
    with pytest.raises(ConfigError):
        load_config([], folder, "text")
    with pytest.raises(ConfigError, match="nested sections"):
        load_config([], folder, "dotted")
    with pytest.raises(ConfigError, match=r"twice.yaml, line 3.*duplicate"):
        load_config([], folder, "twice")
    with pytest.raises(ConfigError, match="There is broken, dotted, mine, old, text or twice"):
        load_config([], folder, "absent")
    with pytest.raises(ConfigError, match="there is no such folder"):
        load_config([], folder / "absent", "mine")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--trainer.seed=7"], "without dashes: trainer.seed=7"),
        (["--multirun", "trainer.seed=1"], "one command for each"),
        (["--sed"], "--help"),
    ],
)
def test_options_that_are_none(argv: list[str], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_arguments(argv)
    assert words in str(caught.value)


def test_options_may_stand_anywhere() -> None:
    arguments = parse_arguments(["a.b=1", "--cfg", "job", "c.d=2", "--config-name", "x", "+e.f=3"])
    assert arguments.overrides == ["a.b=1", "c.d=2", "+e.f=3"]
    assert (arguments.cfg, arguments.config_name) == ("job", "x")


def test_run_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first, second = make_run_folder("outputs/day/time", named=False), make_run_folder("outputs/day/time", named=False)
    assert first == tmp_path / "outputs/day/time"
    assert second == tmp_path / "outputs/day/time-2"
    assert make_run_folder("mine", named=True) == make_run_folder("mine", named=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be made"):
        make_run_folder("file/below", named=True)
    config = from_mapping({"trainer": {"run_name": "fast"}})
    assert resolve_run_dir("runs/${trainer.run_name}", config) == "runs/fast"
    with pytest.raises(ConfigError, match="cannot be resolved"):
        resolve_run_dir("runs/${trainer.nme}", config)


@pytest.fixture
def ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Overrides of a config that passes every check, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "rows.jsonl").write_text("")
    return ["trainer.policy.model.path=./model", "data.train_data=rows.jsonl", "data.val_data=rows.jsonl"]


def test_a_run_gets_its_config_and_folder(ready: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[tuple[Config, Path]] = []
    code = door.run(lambda config, folder: seen.append((config, folder)), [*ready, "hydra.run.dir=here"])
    assert code == 0
    ((config, folder),) = seen
    assert folder == tmp_path / "here" and Path.cwd() == tmp_path
    text = (folder / "config.yaml").read_text()
    assert text.startswith("# trainer.policy.model.path=./model data.train_data=rows.jsonl")
    assert from_mapping(yaml.safe_load(text)) == config
    assert "1,024 prompts x 5 samples = 5,120 trajectories a step" in capsys.readouterr().out


def test_the_default_run_folder_is_dated(ready: list[str], tmp_path: Path) -> None:
    folders: list[Path] = []
    door.run(lambda _, folder: folders.append(folder), ready)
    parts = folders[0].relative_to(tmp_path).parts
    assert parts[0] == "outputs" and len(parts) == 3
    time.strptime(f"{parts[1]} {parts[2]}", "%Y-%m-%d %H-%M-%S")


def test_warnings_are_printed(ready: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert door.run(lambda *_: None, [*ready, "trainer.algorithm.gamma=0.9"]) == 0
    assert "warning: trainer.algorithm.gamma=0.9" in capsys.readouterr().err


def test_our_errors_are_one_line_and_others_pass(ready: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    def breach(*_: object) -> None:
        raise InvariantError("the ratio is 2")

    def bug(*_: object) -> None:
        raise KeyError("ours")

    assert door.run(breach, ready) == 2
    assert capsys.readouterr().err == "error: the ratio is 2\n"
    with pytest.raises(KeyError):
        door.run(bug, ready)


def test_errors_of_tasks_that_ran_together(ready: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    def both(*_: object) -> None:
        raise ExceptionGroup("tasks", [InvariantError("a"), ExceptionGroup("inner", [InvariantError("b")])])

    def mixed(*_: object) -> None:
        raise ExceptionGroup("tasks", [InvariantError("a"), KeyError("ours")])

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    assert door.run(both, ready) == 2
    assert capsys.readouterr().err == "error: a\nerror: b\n"
    with pytest.raises(ExceptionGroup):
        door.run(mixed, ready)
    assert door.run(stopped, ready) == 130


def test_a_bad_environment_variable_is_told(
    ready: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SKYRL_LOG_LEVEL", "loud")
    assert door.run(lambda *_: None, ready) == 2
    assert "SKYRL_LOG_LEVEL='loud': is not one of debug" in capsys.readouterr().err


def command(*argv: str, cwd: Path, poisoned: Path | None = None) -> subprocess.CompletedProcess[str]:
    path = [str(p) for p in (poisoned, ROOT) if p]
    return subprocess.run(
        [sys.executable, "-m", "skyrl_train.entrypoints.main_base", *argv], cwd=cwd, text=True, capture_output=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"}, timeout=60, check=False,
    )  # fmt: skip


@pytest.fixture
def poisoned(tmp_path: Path) -> Path:
    """Packages that end the process when they are imported."""
    for name in ("torch", "transformers", "ray", "datasets"):
        (tmp_path / "poison" / name).mkdir(parents=True)
        (tmp_path / "poison" / name / "__init__.py").write_text(f"import os; print('{name} loaded'); os._exit(9)")
    return tmp_path / "poison"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["trainer.polcy.lr=1e-4"], "trainer.polcy.lr=0.0001: there is no such key. Did you mean trainer.policy.opt"),
        (["+trainer.seeed=1"], "trainer.seeed=1: there is no such key. Did you mean trainer.seed"),
        ([*GOOD, "trainer.train_batch_size=100"], "does not divide"),
        (["generator.backend=sglang"], "no model is given"),
        ([*GOOD, "data.train_data=[./absent.parquet]"], "there is no such file"),
        (["trainer.policy.model.path=./absent"], "there is no such folder"),
    ],
)
def test_the_real_command_refuses_quickly_and_without_torch(
    argv: list[str], words: str, tmp_path: Path, poisoned: Path
) -> None:
    walls = []
    for _ in range(3):  # the machine may be busy: the fastest of three counts
        start = time.monotonic()
        done = command(*argv, cwd=tmp_path, poisoned=poisoned)
        walls.append(time.monotonic() - start)
        if walls[-1] < 2.0:
            break
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.startswith("error: ")
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "outputs").exists()
    assert min(walls) < 2.0


def test_the_real_command_prints_the_whole_config(tmp_path: Path, poisoned: Path) -> None:
    done = command("--cfg", "job", "trainer.seed=3", cwd=tmp_path, poisoned=poisoned)
    assert done.returncode == 0, done.stderr
    assert from_mapping(yaml.safe_load(done.stdout)) == load_config(["trainer.seed=3"])
