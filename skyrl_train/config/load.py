"""A plain mapping to a typed ``Config``, and back.

Every mistake is collected, so that one start tells all of them. What a value asks for is judged in ``preflight``, not
here: a config written for a cluster loads on a laptop.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from skyrl_train.config.convert import Mismatch, convert
from skyrl_train.config.derive import derive
from skyrl_train.config.fields import METADATA, Section, default_of
from skyrl_train.config.problems import raise_all
from skyrl_train.config.schema import Config, open_fields, tree, type_hints
from skyrl_train.config.suggest import did_you_mean
from skyrl_train.errors import NO_VALUE, ConfigError, SkyRLError


def from_mapping(mapping: Mapping[str, Any] | DictConfig) -> Config:
    """The typed config of a nested mapping; keys that are absent take their defaults.

    Values may hold OmegaConf interpolations (``${trainer.seed}``, ``${oc.env:HOME}``).

    Raises:
        ConfigError: unknown keys, wrong types, values out of their limits.
    """
    errors: list[SkyRLError] = []
    config = _build(Config, resolve(mapping), "", errors)
    raise_all(_without_echoes(errors))
    derive(config)
    return config


def defaults(kind: type = Config) -> dict[str, Any]:
    """The tree as a nested mapping of defaults, those that follow another key as ``${other.key}``."""
    hints, plain = type_hints(kind), {}
    opened = open_fields(kind)
    for item in fields(kind):
        if isinstance(item.metadata[METADATA], Section):
            plain[item.name] = defaults(hints[item.name])
        elif item.name not in opened:
            plain[item.name] = default_of(item)
    return plain


def resolve(mapping: Mapping[str, Any] | DictConfig) -> dict[str, Any]:
    """``mapping`` over the defaults, interpolations resolved.

    Raises:
        ConfigError: a section that is not a mapping, or an interpolation that leads nowhere.
    """
    raw = OmegaConf.to_container(mapping, resolve=False) if isinstance(mapping, DictConfig) else mapping
    assert isinstance(raw, Mapping)
    errors: list[SkyRLError] = []
    given = _sections(Config, raw, "", errors)
    errors += [_missing(name) for name, value in _flat(given, "") if value == "???"]
    raise_all(errors)
    merged: Any = None
    try:
        merged = OmegaConf.create(_overlay(defaults(), given))
        plain = OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as error:
        raise _unresolved(merged, given, error) from error
    assert isinstance(plain, dict)
    return {str(name): value for name, value in plain.items()}


def _sections(kind: type, node: Mapping[Any, Any], prefix: str, errors: list[SkyRLError]) -> dict[str, Any]:
    """``node`` with empty sections (``trainer:``, nothing below) as mappings; a section that is a value is noted."""
    hints, cleaned = type_hints(kind), {str(name): value for name, value in node.items()}
    for item in fields(kind):
        if not isinstance(item.metadata[METADATA], Section) or item.name not in cleaned:
            continue
        value, name = cleaned[item.name], prefix + item.name
        if value is None or isinstance(value, Mapping):
            cleaned[item.name] = _sections(hints[item.name], value or {}, name + ".", errors)
        elif not (isinstance(value, str) and value.startswith("${")):
            members = [member.name for member in fields(hints[item.name])]
            listed = ", ".join(members[:8]) + (", ..." if len(members) > 8 else "")
            errors.append(ConfigError(name, value, "is a section of keys, not a value.", f"Its keys: {listed}."))
    return cleaned


def _overlay(base: dict[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    """``top`` over ``base``: mappings key by key, everything else as a whole."""
    merged = dict(base)
    for name, value in top.items():
        old = merged.get(name)
        merged[name] = _overlay(old, value) if isinstance(old, dict) and isinstance(value, Mapping) else value
    return merged


def _missing(name: str) -> ConfigError:
    return ConfigError(name, "???", "has no value yet.", "Set it, or remove the line to take the default.")


def _unresolved(merged: Any, raw: Mapping[Any, Any], error: OmegaConfBaseException) -> ConfigError:
    """Names the key that holds the bad interpolation, not one that merely follows it."""
    reason, name, value = str(error).splitlines()[0], error.full_key or "the config", NO_VALUE
    for leaf, text in _flat({str(k): v for k, v in raw.items()}, ""):
        if isinstance(text, str) and "${" in text:
            try:
                OmegaConf.select(OmegaConf.create({leaf: text}) if merged is None else merged, leaf)
            except OmegaConfBaseException as own:
                reason, name, value = str(own).splitlines()[0], leaf, text
                break
    missing = re.search(r"Interpolation key '([^']+)' not found", reason)
    return ConfigError(name, value, f"cannot be resolved: {reason}.", did_you_mean(missing[1]) if missing else "")


def to_plain(config: Config) -> dict[str, Any]:
    """The config as nested plain values, in the form ``from_mapping`` takes."""
    plain = asdict(config)
    gym = plain["environment"]["skyrl_gym"]
    gym.update(gym.pop("others"))
    return plain


def to_yaml(config: Config) -> str:
    """The config as YAML text."""
    return yaml.safe_dump(to_plain(config), sort_keys=False, allow_unicode=True)


def _build(kind: type, node: Any, prefix: str, errors: list[SkyRLError]) -> Any:
    """A dataclass of the tree from its mapping. Where a value is wrong, the default stands in and an error is noted."""
    if not isinstance(node, Mapping):
        errors.append(ConfigError(prefix.rstrip("."), node, "is a section of keys, not a value."))
        return kind()
    hints, values, left = type_hints(kind), {}, {str(k): v for k, v in node.items()}
    opened = open_fields(kind)
    for item in fields(kind):
        about, name = item.metadata[METADATA], prefix + item.name
        if item.name in opened or item.name not in left:
            continue
        value = left.pop(item.name)
        if isinstance(about, Section):
            values[item.name] = _build(hints[item.name], value, name + ".", errors)
            continue
        try:
            values[item.name] = convert(value, hints[item.name], about)
        except Mismatch as mismatch:
            errors.append(ConfigError(name, value, mismatch.reason, mismatch.remedy))
    for field_name in opened:
        values[field_name] = {name: left.pop(name) for name in list(left) if isinstance(left[name], Mapping)}
    errors += [_unknown(name, value) for name, value in _flat(left, prefix)]
    return kind(**values)


def _without_echoes(errors: Sequence[SkyRLError]) -> list[SkyRLError]:
    """A key that merely follows a wrong one is not told again."""
    wrong = {error.key: error.value for error in errors if isinstance(error, ConfigError)}

    def echoes(error: SkyRLError) -> bool:
        leaf = tree().get(error.key) if isinstance(error, ConfigError) else None
        return leaf is not None and leaf.key.follows in wrong and wrong[leaf.key.follows] == wrong[leaf.name]

    return [error for error in errors if not echoes(error)]


def _unknown(name: str, value: Any) -> ConfigError:
    if name in tree():  # "trainer.seed: 1" in a YAML file
        return ConfigError(name, value, "a dotted name is no key in a file.", "Write it as nested sections.")
    return ConfigError(name, value, "there is no such key.", did_you_mean(name))


def _flat(node: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in node.items():
        if isinstance(value, Mapping) and value:
            yield from _flat({str(k): v for k, v in value.items()}, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
