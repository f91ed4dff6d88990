"""The seam between the tracker and wherever metrics go. A sink is one file here, or a class of the user's."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from skyrl_train.errors import ConfigError
from skyrl_train.tracking.run_folder import RunFolder

ALWAYS_ON = ("jsonl", "console")
BUILT_IN = {
    "console": "skyrl_train.tracking.console:ConsoleSink",
    "jsonl": "skyrl_train.tracking.jsonl:JsonlSink",
    "tensorboard": "skyrl_train.tracking.tensorboard:TensorBoardSink",
    "wandb": "skyrl_train.tracking.wandb:WandbSink",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RunInfo:
    """What a sink may know of the run."""

    project: str = "skyrl"
    name: str = "run"
    total_steps: int = 0
    """The last step of the run; 0: not known."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """The resolved config as plain values."""


class Sink:
    """Takes the metrics of each step. ``log`` is all that a sink must have.

    ``trainer.logger=my_pkg.sinks:MySink`` names a subclass; it is called with the run and its folder. A constructor or
    ``open`` that raises stops the run before it starts; a sink that raises later is left out from then on, with a
    warning, for a dashboard that is down must not cost a training.
    """

    def __init__(self, run: RunInfo, folder: RunFolder) -> None:
        self.run, self.folder = run, folder

    def open(self, resumed_after: int) -> None:
        """Called once, before the first ``log``. ``resumed_after`` is the last step already done, or 0."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """The metrics of a step that ended, all of them, once."""
        raise NotImplementedError

    def running(self, step: int | None, phases: Sequence[str]) -> None:
        """The phases now running, outermost first, whenever that changes; ``step`` is None between two steps."""

    def summary(self, values: Mapping[str, Any]) -> None:
        """Final values of the run."""

    def close(self, failed: bool) -> None:
        """The end of the run. Called once, also when the run failed."""


def make_sinks(loggers: str | Sequence[str], run: RunInfo, folder: RunFolder) -> list[Sink]:
    """The sinks named by ``trainer.logger``, with those that are always on first.

    Raises:
        ConfigError: an unknown name, or a class that cannot be imported or is no sink.
        MissingPackageError: the package of a sink is not installed.
    """
    asked = [loggers] if isinstance(loggers, str) else list(loggers)
    names = list(dict.fromkeys((*ALWAYS_ON, *asked)))
    return [_sink_class(name)(run, folder) for name in names]


def _sink_class(name: str) -> type[Sink]:
    target = BUILT_IN.get(name, name)
    module_name, _, class_name = target.partition(":")
    if not (module_name and class_name):
        known = ", ".join(sorted(BUILT_IN))
        raise ConfigError("trainer.logger", name, "is no logger.", f"Use one of {known}, or package.module:Class.")
    try:
        found = getattr(importlib.import_module(module_name), class_name)
    except Exception as error:  # the user's module may raise anything while it is imported
        reason = f"cannot be imported: {type(error).__name__}: {error}."
        raise ConfigError("trainer.logger", name, reason, "Correct the import path or the module.") from error
    if not (isinstance(found, type) and issubclass(found, Sink)):
        raise ConfigError(
            "trainer.logger", name, "is not a class derived from skyrl_train.tracking.sink.Sink.",
            "Derive it and give it log(step, metrics).",
        )  # fmt: skip
    return found
