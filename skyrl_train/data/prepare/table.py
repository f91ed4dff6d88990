"""The tasks that ``skyrl data`` prepares. Each is imported when it is asked for."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable

from skyrl_train.data.prepare.options import PrepareOptions, Splits
from skyrl_train.errors import ConfigError

_HERE = "skyrl_train.data.prepare"
PREPARERS: dict[str, str] = {
    "addition": f"{_HERE}.addition:prepare",
    "guess": f"{_HERE}.guess:prepare",
    "gsm8k": f"{_HERE}.gsm8k:prepare",
    "math": f"{_HERE}.competition:prepare",
    "countdown": f"{_HERE}.countdown:prepare",
    "svamp": f"{_HERE}.svamp:prepare",
    "wordle": f"{_HERE}.wordle:prepare",
    "text2sql": f"{_HERE}.text2sql:prepare",
    "reasoning_gym": f"{_HERE}.gym_tasks:prepare",
}


def find_preparer(name: str) -> Callable[[PrepareOptions], Splits]:
    """The function that prepares ``name``: split -> rows. ``reasoning_gym:<task>`` names a task of that package.

    Raises:
        ConfigError: no such task.
    """
    family = name.split(":", 1)[0]
    if family not in PREPARERS or (":" in name and family != "reasoning_gym"):
        close = difflib.get_close_matches(name, PREPARERS, n=1)
        remedy = f"Did you mean '{close[0]}'?" if close else ""
        raise ConfigError("data set", name, f"is not one of {', '.join(PREPARERS)}:<task>.", remedy)
    module, function = PREPARERS[family].split(":")
    return getattr(importlib.import_module(module), function)
