"""The door: a command line or YAML files to a run. The only file that knows Hydra.

    a.b=c  +a.b=c  ++a.b=c   the same: a key gets a value. Whether the key exists is for ``load`` to say.
    --config-dir D --config-name N   D/N.yaml, holding only what differs from the defaults
    +experiment=NAME         experiment/NAME.yaml in D, or one of ours
    --cfg job                print the whole resolved config, and stop
    hydra.run.dir=FOLDER     the run folder, in place of outputs/<date>/<time>/

Precedence, low to high: defaults, N.yaml, experiment, command line. The working directory is never changed.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from skyrl_train.config import batch_words, load
from skyrl_train.config.environ import read_environment, set_log_level
from skyrl_train.config.fields import one_of
from skyrl_train.config.machine import check_machine
from skyrl_train.config.preflight import Purpose, preflight
from skyrl_train.config.schema import Config
from skyrl_train.config.suggest import did_you_mean
from skyrl_train.errors import NO_VALUE, ConfigError, SkyRLError

ROOTS = ("trainer", "generator", "data", "environment")
HYDRA_KEYS = ("hydra.run.dir", "hydra.searchpath")
RUN_DIR = "outputs/${now:%Y-%m-%d}/${now:%H-%M-%S}"
EMPTY = "skyrl_defaults"
EXPERIMENTS = Path(__file__).parent / "experiments"


def run(main: Callable[[Config, Path], None], argv: Sequence[str] | None = None, *, purpose: Purpose = "train") -> int:
    """Reads the command line, checks everything that can be checked at once, and calls ``main(config, run_folder)``.

    Args:
        main: what to run. Import what is heavy inside it, so that mistakes show before torch loads.
        argv: arguments without the program's name; None: those of this process.
        purpose: "train", or "generate" for generating and scoring only.

    Returns:
        The exit code: 0; 2 after errors of our own, which are printed without a traceback; 130 after Ctrl-C. Other
        exceptions pass.
    """
    try:
        arguments = parse_arguments(sys.argv[1:] if argv is None else list(argv))
        set_log_level(read_environment())
        composed, run_dir = _compose(arguments.overrides, arguments.config_dir, arguments.config_name)
        config = load.from_mapping(composed)
        if arguments.cfg:
            print(load.to_yaml(config), end="")
            return 0
        warnings = preflight(config, purpose)
        check_machine(config, purpose)
        folder = make_run_folder(resolve_run_dir(run_dir, config), named=run_dir != RUN_DIR)
        _write_config(folder, config, arguments.overrides)
        for warning in warnings:
            _say("warning", warning, 33)
        if purpose == "train":
            print(batch_words.describe(config), flush=True)
        main(config, folder)
    except SkyRLError as error:
        _say("error", str(error), 31)
        return 2
    except ExceptionGroup as group:  # from tasks that ran together
        ours, others = group.split(SkyRLError)
        if ours is None or others is not None:
            raise
        for error in _members(ours):
            _say("error", str(error), 31)
        return 2
    except KeyboardInterrupt:
        _say("error", "interrupted", 31)
        return 130
    return 0


def _members(group: ExceptionGroup) -> Iterator[Exception]:
    for error in group.exceptions:
        if isinstance(error, ExceptionGroup):
            yield from _members(error)
        else:
            yield error


def load_config(
    overrides: Sequence[str] = (), config_dir: str | Path | None = None, config_name: str | None = None
) -> Config:
    """The typed config of overrides and YAML files, as a command line would give it; for scripts and tests.

    Raises:
        ConfigError: whatever is wrong with it. What it asks for is not judged: call ``preflight`` for that.
    """
    composed, _ = _compose(list(overrides), config_dir, config_name)
    return load.from_mapping(composed)


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """The options of every command that takes a config.

    Raises:
        ConfigError: an option that is none.
    """
    parser = argparse.ArgumentParser(
        description="Overrides are KEY=VALUE; `skyrl config` lists every key.", allow_abbrev=False
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--config-dir", "--config-path", "-cd", "-cp", help="folder of YAML files; here, if not given")
    parser.add_argument("--config-name", "-cn", help="YAML file in that folder, without its ending")
    parser.add_argument("--cfg", "-c", choices=("job",), help="print the resolved config and stop")
    parser.add_argument("--resolve", action="store_true", help="with --cfg: always so here")
    arguments, unknown = parser.parse_known_intermixed_args(argv)
    if unknown:
        name, _, value = unknown[0].partition("=")
        if "." in name:
            remedy = f"Write it without dashes: {name.lstrip('-')}={value or 'VALUE'}"
        elif name in ("--multirun", "-m"):
            remedy = "Start one command for each set of values."
        else:
            remedy = "--help lists the options."
        raise ConfigError(unknown[0], NO_VALUE, "there is no such option.", remedy)
    return arguments


def make_run_folder(run_dir: str, named: bool) -> Path:
    """Makes the run folder. One the user ``named`` may exist; otherwise two runs of one second get two folders.

    Raises:
        ConfigError: it cannot be made.
    """
    folder, copy = Path(run_dir).expanduser().absolute(), 1
    try:
        while True:
            try:
                folder.mkdir(parents=True, exist_ok=named)
                return folder
            except FileExistsError:
                if named:
                    raise
                copy += 1
                folder = Path(f"{Path(run_dir).absolute()}-{copy}")
    except OSError as error:
        raise ConfigError("hydra.run.dir", run_dir, f"the run folder cannot be made ({error}).") from error


def _compose(
    overrides: Sequence[str], config_dir: str | Path | None, config_name: str | None
) -> tuple[DictConfig, str]:
    """The given config without defaults, and ``hydra.run.dir``, interpolations not resolved."""
    folder = _config_folder(overrides, config_dir, config_name)
    lines = [_normalised(text, folder) for text in overrides]
    _register()
    opened = (
        initialize(config_path=None, version_base="1.3")
        if folder is None
        else initialize_config_dir(str(folder), version_base="1.3")
    )
    name = config_name.removesuffix(".yaml") if config_name else EMPTY
    try:
        with opened:
            composed = compose(config_name=name, overrides=lines, return_hydra_config=True)
    except MissingConfigException as error:
        raise _missing(error, folder) from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{mark.name}, line {mark.line + 1}" if mark else str(folder)
        reason = f"is no YAML: {getattr(error, 'problem', None) or error}."
        raise ConfigError(where, NO_VALUE, reason, "Look at indentation and colons there.") from error
    except (HydraException, OmegaConfBaseException) as error:
        reason = str(error.__cause__ or error).splitlines()[0].rstrip(".")
        raise ConfigError("the config", NO_VALUE, f"cannot be put together: {reason}.") from error
    OmegaConf.set_struct(composed, False)
    pattern = OmegaConf.to_container(composed.pop("hydra"), resolve=False)["run"]["dir"]  # pyright: ignore
    return composed, pattern


def resolve_run_dir(pattern: str, config: Config) -> str:
    """``hydra.run.dir`` with its interpolations (``${now:%H}``, ``${trainer.run_name}``) filled in.

    Raises:
        ConfigError: an interpolation that leads nowhere.
    """
    try:
        whole = OmegaConf.create({**load.to_plain(config), "hydra": {"run": {"dir": pattern}}})
        return str(whole.hydra.run.dir)
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise ConfigError("hydra.run.dir", pattern, f"cannot be resolved: {reason}.") from error


def _config_folder(overrides: Sequence[str], config_dir: str | Path | None, config_name: str | None) -> Path | None:
    """The folder to look in: the given one, or here if a name is to be found."""
    if config_dir is not None:
        folder = Path(config_dir).expanduser().absolute()
        if not folder.is_dir():
            raise ConfigError("--config-dir", str(config_dir), "there is no such folder.")
        return folder
    looks = config_name is not None or any(text.lstrip("+").startswith("experiment") for text in overrides)
    return Path.cwd() if looks else None


def _normalised(text: str, folder: Path | None) -> str:
    """An override in the form that Hydra takes whatever the key: ``++a.b=c``, or ``+experiment@_global_=NAME``."""
    try:
        override = OverridesParser.create().parse_override(text)
    except (OverrideParseException, HydraException) as error:
        remedy = "Write KEY=VALUE; quote values that hold spaces, commas, colons or brackets: KEY='\"a, b\"'."
        raise ConfigError(text, NO_VALUE, "cannot be read as an override.", remedy) from error
    key, value = override.key_or_group, text.partition("=")[2]
    if override.is_sweep_override():
        raise ConfigError(key, value, "gives several values.", _one_value(override))
    if key.split(".")[0].split("/")[0] == "hydra":
        if key not in HYDRA_KEYS:
            remedy = "Use SKYRL_LOG_LEVEL for the log level." if "verbose" in key or "logging" in key else ""
            raise ConfigError(key, NO_VALUE, f"of Hydra's own keys, {one_of(HYDRA_KEYS)} are served.", remedy)
        return text
    if "." in key or key in ROOTS:
        return text if override.type is OverrideType.DEL else "++" + text.lstrip("+")
    if key == "experiment" and override.package is None:
        return text.lstrip("+").replace("experiment", "+experiment@_global_", 1)
    if folder is not None and (folder / key).is_dir():
        return "+" + text.lstrip("+")
    raise ConfigError(key, value, "there is no such key.", did_you_mean(key))


def _one_value(override: Override) -> str:
    return (
        f"For a list write {override.key_or_group}=[a,b]; for one text with a comma, quote it; for a sweep, start "
        + ("one command for each value.")
    )


def _register() -> None:
    """What Hydra finds besides the user's files: empty primary configs, and our experiments."""
    store = ConfigStore.instance()
    for name in (EMPTY, "ppo_base_config"):  # the latter is the public packages' name, which users' files refer to
        store.store(name=name, node={})
    for path in sorted(EXPERIMENTS.glob("*.yaml")):
        store.store(group="experiment", name=path.stem, node=OmegaConf.load(path))


def _missing(error: MissingConfigException, folder: Path | None) -> ConfigError:
    wanted = str(error.missing_cfg_file)
    if wanted.startswith("experiment/"):
        names = {path.stem for path in EXPERIMENTS.glob("*.yaml")}
        names |= {path.stem for path in folder.glob("experiment/*.yaml")} if folder else set()
        return ConfigError(
            "experiment", wanted.removeprefix("experiment/"), "there is no such experiment.", _have(names)
        )
    return ConfigError("--config-name", wanted, f"there is no such file in {folder}.", _have(_yaml_names(folder)))


def _yaml_names(folder: Path | None) -> set[str]:
    return {path.stem for path in folder.glob("*.yaml")} if folder else set()


def _have(names: set[str]) -> str:
    return f"There is {one_of(sorted(names))}." if names else "There is none."


def _write_config(folder: Path, config: Config, overrides: Sequence[str]) -> None:
    """``config.yaml``, complete and resolved; its first line repeats what was typed."""
    typed = shlex.join(overrides).replace("\n", " ")
    (folder / "config.yaml").write_text(f"# {typed}\n{load.to_yaml(config)}", encoding="utf-8")


def _say(word: str, text: str, color: int) -> None:
    plain = not sys.stderr.isatty() or bool(os.environ.get("NO_COLOR"))
    shown: Any = f"{word}:" if plain else f"\033[{color}m{word}:\033[0m"
    print(shown, text, file=sys.stderr, flush=True)
