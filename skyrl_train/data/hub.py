"""Rows out of a Hugging Face data set. The package ``datasets`` is imported here alone, and late."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from skyrl_train.data.files import Located
from skyrl_train.errors import DataError, MissingPackageError

_NAME = re.compile(r"(?P<name>[\w.-]+(/[\w.-]+)?)(:(?P<split>[\w.+%\[\]:-]+))?")
_PROBE_SECONDS = 10.0


def split_name(source: str) -> tuple[str, str] | None:
    """``(name, split)`` of a source written ``name`` or ``name:split``; None if it cannot be a data set's name."""
    if source.startswith((".", "~", "/")) or (match := _NAME.fullmatch(source)) is None:
        return None
    return match["name"], match["split"] or "train"


def read_hub(name: str, split: str, config: str | None = None) -> Iterator[Located]:
    """The rows of one split. Without a network only what is in the local cache can be had.

    Raises:
        DataError: the hub cannot be reached, or has no such data set or split.
        MissingPackageError: ``datasets`` is not installed.
    """
    try:
        from datasets import config as settings
        from datasets import load_dataset
    except ImportError as error:
        raise MissingPackageError("datasets", f"the data set '{name}'", 'pip install "skyrl-train[data]"') from error
    offline = settings.HF_HUB_OFFLINE
    # Left to itself the client retries an unreachable hub for half a minute before it looks into the cache.
    settings.HF_HUB_OFFLINE = offline or not _reachable(name)
    try:
        table: Any = load_dataset(name, config, split=split)
    except ImportError:
        raise
    except Exception as error:  # the client raises errors of many packages, all of them "this cannot be had"
        raise DataError(_explain(name, split, error, settings.HF_HUB_OFFLINE)) from error
    finally:
        settings.HF_HUB_OFFLINE = offline
    for number, row in enumerate(table):
        yield f"row {number}", dict(row)


def _reachable(name: str) -> bool:
    """Whether the hub answers within ten seconds; an answer of "no such data set" is an answer."""
    import httpx
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        httpx.head(constants.ENDPOINT, timeout=_PROBE_SECONDS)
    except httpx.HTTPError:
        return False
    return True


def _explain(name: str, split: str, error: Exception, offline: bool) -> str:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    if offline:
        return (
            f"{name}: this Hugging Face data set cannot be had: the hub cannot be reached and the local cache does not "
            f"hold it ({reason}). Without a network, give the path of a local file."
        )
    return f"{name}: the split '{split}' of this Hugging Face data set cannot be loaded ({reason})."
