"""What a typed config asks for, compared with what there is. No torch, no network.

    limits declared with a key (``fields.Key``)        ┐
    rules between keys (``rules``)                     ├─>  one error for each key  |  warnings
    settings whose mechanism is switched off           ┘

A key we accept does what it says. So a value is refused where nothing would act on it; only the settings of a mechanism
that is switched off (a KL coefficient without KL) get a warning, because turning a mechanism off for one run is common.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from skyrl_train.config import rules
from skyrl_train.config.backend import resolve_backend
from skyrl_train.config.convert import IMPORT_PATH
from skyrl_train.config.fields import one_of, wanted_values
from skyrl_train.config.problems import raise_all
from skyrl_train.config.schema import Config, Leaf, tree, value_of
from skyrl_train.errors import ConfigError, NotSupportedError, SkyRLError

Purpose = Literal["train", "generate"]


def preflight(config: Config, purpose: Purpose = "train") -> list[str]:
    """Refuses what cannot be served.

    Args:
        config: a typed config.
        purpose: "train", or "generate" for generating and scoring only.

    Returns:
        Warnings, one sentence each, for combinations that are allowed and probably not meant.

    Raises:
        NotSupportedError: a key whose capability is not there.
        ConfigError: values that cannot be together.
    """
    found: dict[str, SkyRLError] = {}
    for error in [*rules.broken(config, purpose), *_unavailable(config)]:
        found.setdefault(error.key, error)  # the rule between keys says more than the limit of one
    raise_all(list(found.values()))
    return [*rules.doubtful(config, purpose), *_without_effect(config)]


def _unavailable(config: Config) -> Iterator[ConfigError]:
    backend = resolve_backend(config)
    for leaf in tree().values():
        value = value_of(config, leaf.name)
        yield from _without_capability(config, leaf, value)
        backends = leaf.key.backends
        if backends and backend not in backends and value != _default(config, leaf):
            setting = f"generator.backend={config.generator.backend}"
            reason = f"means something to {one_of(backends)} only, and this run uses the {backend} engine ({setting})."
            remedy = leaf.key.instead or "Remove the key."
            if config.generator.backend == "auto":
                first = backends[0]
                remedy += f" Or set generator.backend={first} (to install it: uv sync --extra {first})."
            yield NotSupportedError(leaf.name, value, reason, remedy)


def _without_capability(config: Config, leaf: Leaf, value: Any) -> Iterator[ConfigError]:
    sections = [s for s in leaf.sections if s.capability]
    capability = leaf.key.capability or (sections[0].capability if sections else "")
    if not capability or value in (leaf.key.off or (_default(config, leaf),)):
        return
    if leaf.key.import_path and isinstance(value, str) and IMPORT_PATH.fullmatch(value):
        return
    capability = capability.format(value=value)
    reason = f"asks for {capability}: {leaf.key.reason}." if leaf.key.reason else (
        f"needs {capability}, which this version does not have."
    )  # fmt: skip
    instead = leaf.key.instead or next((s.instead for s in sections if s.instead), "")
    yield NotSupportedError(leaf.name, value, reason, instead or _back_to_default(config, leaf))


def _back_to_default(config: Config, leaf: Leaf) -> str:
    return f"Remove the key, or set it to {shown(_default(config, leaf))}."


def _without_effect(config: Config) -> Iterator[str]:
    for leaf in tree().values():
        if leaf.key.switch is None or value_of(config, leaf.name) == _default(config, leaf):
            continue
        other, value = leaf.key.switch[0], value_of(config, leaf.key.switch[0])
        users_own = tree()[other].key.import_path and isinstance(value, str) and ":" in value  # may read any key
        if value not in wanted_values(leaf.key.switch) and not users_own:
            now = f"{other}={shown(value)}"
            yield f"{leaf.name}={shown(value_of(config, leaf.name))} has no effect while {now}."


def _default(config: Config, leaf: Leaf) -> Any:
    return value_of(config, leaf.key.follows) if leaf.key.follows else leaf.default


def shown(value: Any) -> str:
    """A value as a user would write it."""
    return (
        {None: "null", True: "true", False: "false"}[value]
        if value is None or value is True or value is False
        else str(value)
    )
