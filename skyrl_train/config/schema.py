"""``Config``: the root of the tree, and ``leaves``, which walks it.

The tree of dataclasses is the only source of keys, types, defaults and help. A config is made by ``load.from_mapping``
or, from a command line, by ``door.load_config``: calling ``Config()`` leaves the defaults that follow another key
unresolved.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from typing import Any

from skyrl_train.config.data import DataConfig
from skyrl_train.config.environment import EnvironmentConfig
from skyrl_train.config.fields import METADATA, Key, Section, default_of, section
from skyrl_train.config.generator import GeneratorConfig
from skyrl_train.config.trainer import TrainerConfig


@dataclass(slots=True, kw_only=True)
class Config:
    """A whole run."""

    trainer: TrainerConfig = section(TrainerConfig)
    generator: GeneratorConfig = section(GeneratorConfig)
    data: DataConfig = section(DataConfig)
    environment: EnvironmentConfig = section(EnvironmentConfig)


@dataclass(frozen=True, slots=True, kw_only=True)
class Leaf:
    """One key of the tree."""

    name: str
    """Full dotted name."""
    type: Any
    default: Any
    """A default that follows another key is its interpolation, ``${other.key}``."""
    key: Key
    sections: tuple[Section, ...]
    """The sections that hold it, outermost first."""


@cache
def type_hints(kind: type) -> dict[str, Any]:
    """The resolved types of a config dataclass, by field name."""
    return typing.get_type_hints(kind)


def leaves(kind: type = Config, prefix: str = "", sections: tuple[Section, ...] = ()) -> Iterator[Leaf]:
    """Every key of the tree, in the order of its declaration. Fields that take open sub-sections are left out."""
    opened, hints = open_fields(kind), type_hints(kind)
    for item in fields(kind):
        about, name = item.metadata[METADATA], prefix + item.name
        if isinstance(about, Section):
            yield from leaves(hints[item.name], name + ".", (*sections, about))
        elif item.name not in opened:
            yield Leaf(name=name, type=hints[item.name], default=default_of(item), key=about, sections=sections)


def open_fields(kind: type) -> frozenset[str]:
    """Fields that hold sub-sections by any name; the one open section names them in ``OPEN``."""
    return frozenset(getattr(kind, "OPEN", ()))


@cache
def tree() -> dict[str, Leaf]:
    """Every key of ``Config`` by its full name."""
    return {leaf.name: leaf for leaf in leaves()}


def value_of(config: Config, name: str) -> Any:
    """The value of a key by its full dotted name."""
    value: Any = config
    for part in name.split("."):
        value = getattr(value, part)
    return value


def type_text(hint: Any) -> str:
    """A type as a user reads it: ``list of strings, or null``."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        parts = [type_text(part) for part in typing.get_args(hint) if part is not type(None)]
        return " or ".join(parts) + (" or null" if type(None) in typing.get_args(hint) else "")
    if typing.get_origin(hint) is list:
        return f"list of {_PLURAL.get(typing.get_args(hint)[0], 'values')}"
    if typing.get_origin(hint) is dict or is_dataclass(hint):
        return "mapping"
    return _SINGULAR.get(hint, "any")


_SINGULAR: dict[Any, str] = {int: "integer", float: "number", bool: "true/false", str: "string"}
_PLURAL: dict[Any, str] = {int: "integers", float: "numbers", str: "strings"}
