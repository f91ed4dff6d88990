"""What a config needs of this machine, looked at without importing it: files, folders and optional packages."""

from __future__ import annotations

import glob
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from skyrl_train.config.backend import resolve_backend, resolve_runtime
from skyrl_train.config.preflight import Purpose
from skyrl_train.config.problems import raise_all
from skyrl_train.config.schema import Config
from skyrl_train.errors import ConfigError, MissingPackageError, SkyRLError

_DATA_FILES = (".parquet", ".jsonl", ".json")


def check_machine(config: Config, purpose: Purpose = "train") -> None:
    """Looks for the data, the model folder and the packages that the config names.

    Raises:
        ConfigError: a local path that is not there. Names that could be on the hub are left to those who load them.
        MissingPackageError: an optional package is needed and absent.
    """
    raise_all([*_data(config, purpose), *_model(config), *_packages(config)])


def _data(config: Config, purpose: Purpose) -> Iterator[SkyRLError]:
    trainer = config.trainer
    evaluates = purpose == "generate" or trainer.eval_interval > 0 or trainer.eval_before_train
    wanted = {"data.train_data": config.data.train_data if purpose == "train" else []}
    wanted["data.val_data"] = config.data.val_data if evaluates else []
    for name, paths in wanted.items():
        for path in paths:
            if _is_local(path) and not glob.glob(path):
                remedy = "Correct the path, or make the data with `skyrl data NAME --out DIR`."
                if name == "data.val_data":
                    remedy += (
                        " To train without: data.val_data=[] trainer.eval_interval=-1 trainer.eval_before_train=false"
                    )
                yield ConfigError(name, path, "there is no such file.", remedy)


def _model(config: Config) -> Iterator[SkyRLError]:
    trainer = config.trainer
    models = {"trainer.policy.model.path": trainer.policy.model.path}
    if trainer.ref.model.path != trainer.policy.model.path:
        models["trainer.ref.model.path"] = trainer.ref.model.path
    if trainer.critic.model.path:
        models["trainer.critic.model.path"] = trainer.critic.model.path
    for name, path in models.items():
        if not path:
            continue
        remedy = "`skyrl warmup --out DIR` makes a small model on any machine."
        if Path(path).is_dir():
            if not (Path(path) / "config.json").is_file():
                yield ConfigError(name, path, "the folder holds no config.json, so it is no model.", remedy)
        elif _is_local(path) or path.count("/") > 1:  # a hub name has one slash
            yield ConfigError(name, path, "there is no such folder.", remedy)


def _packages(config: Config) -> Iterator[SkyRLError]:
    names = config.trainer.logger
    loggers = [names] if isinstance(names, str) else names
    needed = [(name, f"trainer.logger={name}", name) for name in loggers if name in ("tensorboard", "wandb")]
    if resolve_runtime(config) == "ray":
        needed.append(("ray", "trainer.placement.runtime=ray", "ray"))
    generator = config.generator
    if resolve_backend(config) == "sglang" and generator.run_engines_locally and generator.engine_python is None:
        needed.append(("sglang", "generator.backend=sglang (No module named 'sglang')", "sglang"))
    for package, purpose, extra in needed:
        if find_spec(package) is None:
            elsewhere = ", or set generator.engine_python to the Python of an environment that has it"
            install = f'pip install "skyrl-train[{extra}]"'
            if package == "sglang":
                install += f" (or: uv sync --extra sglang){elsewhere}"
            yield MissingPackageError(package, purpose, install)


def _is_local(path: str) -> bool:
    """Whether a path can only be on this machine: ``org/name`` may be on the hub."""
    return path.startswith(("/", "./", "../", "~")) or path.endswith(_DATA_FILES) or bool(glob.has_magic(path))
