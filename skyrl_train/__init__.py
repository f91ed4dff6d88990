"""Reinforcement learning for language models, with stock SGLang as the first-class inference engine."""

import os
from importlib import import_module
from typing import Any

# Two OpenMP threads spin at each other's expense as soon as cores are shared. libgomp reads this once, with torch.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

__version__ = "0.1.0"

_LATE = {"SGLangInferenceEngine": "skyrl_train.engines.sglang.inference_engine"}


def __getattr__(name: str) -> Any:
    """``from skyrl_train import SGLangInferenceEngine`` loads it only then."""
    if name in _LATE:
        return getattr(import_module(_LATE[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
