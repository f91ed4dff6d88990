"""``key`` and ``section``: how a config dataclass declares a key with its default, its help and what limits it.

The declaration is all there is. The loader types by it, preflight refuses by it, and ``skyrl config`` and
``docs/config.md`` print it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field
from typing import Any

UNCHANGED = object()
METADATA = "skyrl"


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """What is known of one key beside its type and default."""

    help: str
    choices: tuple[Any, ...] = ()
    """The only values, if given; None is allowed where the type allows it."""
    import_path: bool = False
    """Also takes ``package.module:name``."""
    minimum: float | None = None
    above: float | None = None
    maximum: float | None = None
    below: float | None = None
    unit: str = ""
    path: bool = False
    """``~`` is expanded."""
    follows: str = ""
    """The key whose value is the default."""
    capability: str = ""
    """What a value outside ``off`` needs and this version does not have. ``{value}`` is filled in."""
    off: tuple[Any, ...] = ()
    """The values that do not need the capability; empty: the default alone."""
    reason: str = ""
    """Why the capability is not there, in place of the standard sentence."""
    instead: str = ""
    """What to set where the value is refused."""
    backends: tuple[str, ...] = ()
    """The backends for which the key means something; empty: all."""
    switch: tuple[str, Any] | None = None
    """``(key, value)``, or ``(key, (value, ...))``: without that value over there, this key has no effect."""
    was: Any = UNCHANGED
    """The default of the public packages, where ours differs, and ``why``."""
    why: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """What is known of a group of keys."""

    capability: str = ""
    """Needed by every key of the section that differs from its default."""
    instead: str = ""
    backends: tuple[str, ...] = ()
    switch: tuple[str, Any] | None = None


def key(default: Any, help: str, **facts: Any) -> Any:
    """A dataclass field with its facts (see ``Key``). A list or dict default is copied for each config."""
    for name in ("choices", "off", "backends"):
        if isinstance(facts.get(name), list | str):
            raise TypeError(f"{name} is a tuple")
    info = Key(help=help, **facts)
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata={METADATA: info})
    return field(default=default, metadata={METADATA: info})


def follow(other: str, help: str, **facts: Any) -> Any:
    """A key whose default is the value of ``other``."""
    return key(f"${{{other}}}", help, follows=other, **facts)


def section(kind: type, **facts: Any) -> Any:
    """A dataclass field that holds a section."""
    return field(default_factory=kind, metadata={METADATA: Section(**facts)})


def default_of(item: Any) -> Any:
    """The default of a dataclass field, interpolation not resolved."""
    return item.default if item.default is not MISSING else item.default_factory()


def wanted_values(switch: tuple[str, Any]) -> tuple[Any, ...]:
    """The values of the other key with which a key has effect."""
    return switch[1] if isinstance(switch[1], tuple) else (switch[1],)


def one_of(names: Sequence[str]) -> str:
    """``a, b or c`` for messages."""
    shown = [str(name) for name in names]
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} or {shown[-1]}"
