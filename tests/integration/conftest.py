"""One small task and one warm model for all tests, and runs of the whole system on them."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch

from skyrl_train.config.door import load_config
from skyrl_train.config.preflight import preflight

TESTS = Path(__file__).parents[1]
SMALL = """\
model_type: qwen3
hidden_size: 64
num_hidden_layers: 2
num_attention_heads: 2
num_key_value_heads: 1
head_dim: 32
intermediate_size: 128
max_position_embeddings: 512
tie_word_embeddings: false
"""
PASSING = ("time", "tokens_per_s/", "mismatch/")
"""Metrics that may differ between runs that are the same: clocks, and a check that each process makes once."""

Numbers = dict[str, float]


@dataclass(frozen=True)
class Run:
    """What a run left behind."""

    folder: Path

    @property
    def history(self) -> list[Numbers]:
        """The lines of ``metrics.jsonl``."""
        return rows(self.folder / "metrics.jsonl")

    @property
    def steps(self) -> list[int]:
        return [int(line["step"]) for line in self.history]

    @property
    def last(self) -> Numbers:
        return self.history[-1]

    @property
    def events(self) -> list[dict[str, Any]]:
        return rows(self.folder / "events.jsonl")

    def steady(self) -> list[Numbers]:
        """The history without what may differ from run to run."""
        return [{k: v for k, v in line.items() if not k.startswith(PASSING)} for line in self.history]

    def trajectories(self, step: int, kind: str = "") -> list[dict[str, Any]]:
        return rows(self.folder / "trajectories" / f"{kind}step_{step:06d}.jsonl")


@dataclass(frozen=True)
class World:
    """The task, the model, and how to train on them."""

    data: Path
    model: Path

    def overrides(self, folder: Path, *more: str) -> list[str]:
        """A run of 3 steps of 4 prompts x 4 samples, two updates each, its outputs below ``folder``."""
        return [
            f"data.train_data=[{self.data}/train.parquet]",
            f"data.val_data=[{self.data}/validation.parquet]",
            f"trainer.policy.model.path={self.model}",
            f"trainer.ckpt_path={folder}/checkpoints",
            f"trainer.export_path={folder}/exports",
            "environment.env_class=addition",
            "generator.n_samples_per_prompt=4",
            "generator.sampling_params.max_generate_length=24",
            "trainer.policy.optimizer_config.lr=1e-3",
            "trainer.algorithm.use_kl_loss=false",
            "trainer.epochs=10",
            "trainer.max_steps=3",
            "trainer.train_batch_size=4",
            "trainer.policy_mini_batch_size=2",
            "trainer.max_prompt_length=40",
            "trainer.eval_interval=-1",
            "trainer.eval_before_train=false",
            "trainer.ckpt_interval=-1",
            "trainer.num_threads=1",
            *more,
        ]

    def train(self, folder: Path, *more: str, name: str = "run") -> Run:
        """Trains in this process."""
        from skyrl_train import build

        config = load_config(self.overrides(folder, *more))
        preflight(config)
        build.train(config, folder / name)
        return Run(folder / name)


def rows(path: Path) -> list[dict[str, Any]]:
    """The lines of a JSON-lines file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Additions of single digits, and a model that is right now and then."""
    return make_world(tmp_path_factory.mktemp("world"), "addition", "80", "--digits", "1")


@pytest.fixture(scope="session")
def guessing(tmp_path_factory: pytest.TempPathFactory) -> World:
    """The game of several turns, and a model that knows its form."""
    return make_world(tmp_path_factory.mktemp("guessing"), "guess", "40", "--size", "64")


def make_world(folder: Path, task: str, steps: str, *options: str, shape: str = SMALL) -> World:
    """Data of the task, and a model of the given shape after ``steps`` steps of warm-up."""
    from skyrl_train.entrypoints.cli import main

    (folder / "small.yaml").write_text(shape)
    assert main(["data", task, "--out", str(folder / "data"), *options]) == 0
    places = ["--data", str(folder / "data"), "--out", str(folder / "model")]
    made = ["--model-config", str(folder / "small.yaml"), "--threads", "1"]
    assert main(["warmup", *places, *made, "--steps", steps, "--until-accuracy", "1", "--eval-rows", "10"]) == 0
    for split in ("train", "validation"):
        _without_env(folder / "data" / f"{split}.parquet")
    return World(data=folder / "data", model=folder / "model")


def _without_env(file: Path) -> None:
    """Rows that name no env take that of ``environment.env_class``, which the tests choose."""
    table = pyarrow.parquet.read_table(file)
    pyarrow.parquet.write_table(table.drop_columns("env_class"), file)


@pytest.fixture(autouse=True)
def torch_settings() -> Iterator[None]:
    """A run sets threads and determinism for its whole process; the next test is another process's in spirit."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)


Spawn = Callable[..., "Command"]


@dataclass
class Command:
    """A command in a process of its own."""

    process: Any
    out: Path
    err: Path

    def wait(self, timeout: float = 60) -> int:
        self.process.join(timeout)
        assert self.process.exitcode is not None, f"no end within {timeout} s: {self.err.read_text()}"
        return self.process.exitcode


@pytest.fixture
def spawn(server: Any, tmp_path: Path) -> Iterator[Spawn]:
    """``spawn(*arguments, entry="main_base", RAY_ADDRESS=...)`` starts a command, with variables on top of this
    process's; whatever still runs at the end is killed.

    With a ``Moment`` (killing.py) it is killed then.
    """
    started: list[Command] = []

    def start(*arguments: str, entry: str = "main_base", moment: Any = None, **variables: str) -> Command:
        out, err = (tmp_path / f"{kind}{len(started)}.txt" for kind in ("out", "err"))
        process = server.Process(target=_command, args=(entry, arguments, variables, str(out), str(err), moment))
        process.start()
        started.append(Command(process, out, err))
        return started[-1]

    yield start
    for command in started:
        command.process.kill()
        command.process.join()
        command.process.close()


def _command(
    entry: str, arguments: tuple[str, ...], variables: dict[str, str], out: str, err: str, moment: Any
) -> None:
    """In the new process: what ``python -m skyrl_train.entrypoints.<entry>`` does."""
    from importlib import import_module

    os.environ |= variables
    for path, stream in ((out, 1), (err, 2)):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
        os.dup2(descriptor, stream)
        os.close(descriptor)
    if moment is not None:
        moment.arm()
    sys.exit(import_module(f"skyrl_train.entrypoints.{entry}").main(list(arguments)))
