"""Several mistakes of one config, told at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

from skyrl_train.errors import NO_VALUE, ConfigError, SkyRLError


class ConfigErrors(ConfigError):
    """More than one key cannot be used. ``errors`` holds each; ``key`` and the rest are the first one's."""

    def __init__(self, errors: Sequence[SkyRLError]) -> None:
        self.errors = tuple(errors)
        lines = "".join(f"\n  {error}" for error in self.errors)
        first = next((error for error in self.errors if isinstance(error, ConfigError)), None)
        super().__init__("the config", NO_VALUE, f"{len(self.errors)} mistakes.{lines}")
        if first is not None:
            self.key, self.value, self.reason, self.remedy = first.key, first.value, first.reason, first.remedy

    def __reduce__(self):  # pyright: ignore[reportIncompatibleMethodOverride]
        return type(self), (self.errors,)


def raise_all(errors: Sequence[SkyRLError]) -> None:
    """Raises what was collected: one error as it is, several as ``ConfigErrors``; nothing if there is none."""
    if errors:
        _raise(list(errors))


def _raise(errors: list[SkyRLError]) -> NoReturn:
    raise errors[0] if len(errors) == 1 else ConfigErrors(errors)
