from __future__ import annotations

import pytest

from skyrl_train.errors import ConfigError, MissingPackageError
from skyrl_train.tracking.run_folder import RunFolder
from skyrl_train.tracking.sink import RunInfo, Sink, make_sinks


class Mine(Sink):
    def log(self, step, metrics):
        pass


def names(loggers, folder: RunFolder) -> list[str]:
    return [type(sink).__name__ for sink in make_sinks(loggers, RunInfo(), folder)]


@pytest.mark.parametrize(
    ("loggers", "expected"),
    [
        ([], ["JsonlSink", "ConsoleSink"]),
        ("console", ["JsonlSink", "ConsoleSink"]),
        ("tensorboard", ["JsonlSink", "ConsoleSink", "TensorBoardSink"]),
        (["jsonl", f"{__name__}:Mine", "tensorboard"], ["JsonlSink", "ConsoleSink", "Mine", "TensorBoardSink"]),
    ],
)
def test_one_name_or_several(loggers, expected, folder: RunFolder):
    assert names(loggers, folder) == expected


@pytest.mark.parametrize(
    ("logger", "reason"),
    [
        ("tensorbord", r"trainer.logger='tensorbord': is no logger. Use one of console, jsonl, tensorboard, wandb, or"),
        ("no_such_module:Mine", "cannot be imported: ModuleNotFoundError: No module named 'no_such_module'"),
        (f"{__name__}:Absent", "cannot be imported: AttributeError"),
        (f"{__name__}:RunInfo", "is not a class derived from"),
        (f"{__name__}:make_sinks", "is not a class derived from"),
        (":Mine", "is no logger"),
        ("..x:Mine", "cannot be imported"),
    ],
)
def test_what_is_no_sink_is_refused(logger: str, reason: str, folder: RunFolder):
    with pytest.raises(ConfigError, match=reason):
        make_sinks(logger, RunInfo(), folder)


@pytest.mark.parametrize("package", ["wandb", "tensorboard"])
def test_a_missing_package_is_named_with_the_command(package: str, python, tmp_path):
    done = python(
        "import sys; sys.modules[sys.argv[1]] = None\n"  # as Python itself marks what cannot be imported
        "from skyrl_train.tracking.run_folder import RunFolder\n"
        "from skyrl_train.tracking.sink import RunInfo, make_sinks\n"
        "make_sinks(sys.argv[1], RunInfo(), RunFolder(sys.argv[2]))",
        package, tmp_path / "run",
    )  # fmt: skip
    assert done.stderr.splitlines()[-1] == (
        f"skyrl_train.errors.{MissingPackageError.__name__}: trainer.logger={package} needs the package '{package}', "
        f'which is not installed. Run: pip install "skyrl-train[{package}]"'
    )
