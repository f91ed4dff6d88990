"""The errors a user can meet, as one small tree.

    SkyRLError
    ├── ConfigError        (ValueError)    a key, its value, why it cannot work, what to set
    │   └── NotSupportedError              a valid key whose capability is not there (yet, or with this backend)
    ├── MissingPackageError                an optional package is needed; says what to install (ModuleNotFoundError)
    ├── DataError          (ValueError)    a data file or row
    ├── ModelError         (ValueError)    a model folder, tokenizer or chat template
    ├── EnvError                           an environment broke its contract, raised, or hung
    │   └── EnvTimeoutError (TimeoutError)
    ├── GenerationError                    a step from which no usable trajectory came
    ├── EngineError                        an inference engine failed, named by its address
    │   └── EngineTimeoutError (TimeoutError)
    ├── WeightSyncError                    names the phase, the engine, the bucket and the rank
    ├── CheckpointError                    a checkpoint that is absent, partial, or does not fit
    ├── InvariantError                     a number that must hold did not: the run was wrong
    ├── DivergedError                      losses or gradients stopped being finite; carries the advice
    └── WorkerError                        a worker died or could not be placed; names rank and node

Each also inherits the standard error it refines, so ``except ValueError`` keeps working. The commands print these
without a traceback; anything else is a fault of ours and keeps its traceback.
"""

from __future__ import annotations


class SkyRLError(Exception):
    """Base of every error this project raises on purpose."""


class ConfigError(SkyRLError, ValueError):
    """A configuration that cannot work. The message carries key, value, reason and remedy."""

    def __init__(self, key: str, value: object, reason: str, remedy: str = "") -> None:
        self.key, self.value, self.reason, self.remedy = key, value, reason, remedy
        shown = "" if value is NO_VALUE else f"={value!r}"
        super().__init__(f"{key}{shown}: {reason}" + (f" {remedy}" if remedy else ""))

    def __reduce__(self):  # Exception pickles by args, which hold one formatted text
        return type(self), (self.key, self.value, self.reason, self.remedy)


class NotSupportedError(ConfigError):
    """A well-formed value that asks for a capability which is not available."""


class MissingPackageError(SkyRLError, ModuleNotFoundError):
    """An optional package is needed and absent."""

    def __init__(self, package: str, needed_for: str, install: str) -> None:
        self.package, self.needed_for, self.install = package, needed_for, install
        super().__init__(f"{needed_for} needs the package '{package}', which is not installed. Run: {install}")

    def __reduce__(self):
        return type(self), (self.package, self.needed_for, self.install)


class DataError(SkyRLError, ValueError):
    """A data file or row that cannot be used; names file and row."""


class ModelError(SkyRLError, ValueError):
    """A model folder, tokenizer or chat template that cannot be used."""


class EnvError(SkyRLError):
    """An environment raised, or returned something that breaks its contract."""


class EnvTimeoutError(EnvError, TimeoutError):
    """An environment did not answer within ``environment.timeout`` seconds."""


class GenerationError(SkyRLError):
    """No usable trajectory came out of a step; the message counts the causes."""


class EngineError(SkyRLError):
    """An inference engine failed; the message names the engine."""


class EngineTimeoutError(EngineError, TimeoutError):
    """An inference engine did not answer in time."""


class WeightSyncError(SkyRLError):
    """Weights did not reach an engine; the message names phase, engine, bucket and rank."""


class CheckpointError(SkyRLError):
    """A checkpoint that is absent, partial, or does not fit this run."""


class InvariantError(SkyRLError):
    """A quantity that must hold by construction does not; the message names the likely cause."""


class DivergedError(SkyRLError):
    """Several updates in a row had a loss or gradient that is not finite."""


class WorkerError(SkyRLError):
    """A worker process died or could not be placed; the message names rank and node."""


NO_VALUE = object()
"""Passed as ``ConfigError.value`` when the key has no value worth printing."""
