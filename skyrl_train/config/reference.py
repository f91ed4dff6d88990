"""The reference of all keys, printed by ``skyrl config`` and written to ``docs/config.md``, from the tree itself.

Write the page anew with ``python -m skyrl_train.config.reference > docs/config.md``.
"""

from __future__ import annotations

import textwrap
from typing import Any

import yaml

from skyrl_train.config.fields import UNCHANGED, one_of, wanted_values
from skyrl_train.config.schema import Leaf, tree, type_text
from skyrl_train.config.suggest import did_you_mean
from skyrl_train.errors import ConfigError


def table(filter: str | None = None) -> str:
    """Key, type, default and help as text; ``filter`` keeps keys whose name or help contains it.

    Raises:
        ConfigError: nothing matches.
    """
    chosen = [leaf for leaf in tree().values() if filter is None or _matches(leaf, filter.lower())]
    if not chosen:
        raise ConfigError(str(filter), "", "no key contains this.", did_you_mean(str(filter)))
    blocks = []
    for leaf in chosen:
        text = textwrap.fill(_help(leaf), 110, initial_indent="    ", subsequent_indent="    ")
        blocks.append(f"{leaf.name}={value_text(leaf.default)}  ({_type(leaf)})\n{text}")
    return "\n".join(blocks)


def markdown() -> str:
    """The page ``docs/config.md``."""
    parts = [_INTRODUCTION]
    for title in dict.fromkeys(_section(name) for name in tree()):
        rows = [leaf for name, leaf in tree().items() if _section(name) == title]
        parts.append(f"## {title}\n\n| key | type | default | |\n|---|---|---|---|\n" + "".join(map(_row, rows)))
    parts.append(_ENVS + "\n" + _changed())
    return "\n".join(parts)


def value_text(value: Any) -> str:
    """A value as YAML writes it in one line."""
    if isinstance(value, str):
        return value or '""'
    if isinstance(value, float):
        return f"{value:g}"
    return yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("...\n").strip()


def _matches(leaf: Leaf, text: str) -> bool:
    return text in leaf.name.lower() or text in leaf.key.help.lower()


def _section(name: str) -> str:
    """Keys are listed by root, and by the section below it where there is one."""
    parts = name.split(".")
    return ".".join(parts[:2]) if len(parts) > 2 else parts[0]


def _type(leaf: Leaf) -> str:
    if not leaf.key.choices:
        return type_text(leaf.type) + (f", {leaf.key.unit}" if leaf.key.unit else "")
    names = [str(choice) for choice in leaf.key.choices] + (["module:name"] if leaf.key.import_path else [])
    return ", ".join(names) + (", null" if type_text(leaf.type).endswith("or null") else "")


def _help(leaf: Leaf) -> str:
    key, parts = leaf.key, [leaf.key.help]
    if limits := _limits(leaf):
        parts.append(limits)
    if key.backends:
        parts.append(f"For {one_of(key.backends)} engines.")
    capability = key.capability or next((s.capability for s in leaf.sections if s.capability), "")
    if capability:
        off = one_of([value_text(value) for value in key.off]) if key.off else "the default"
        parts.append(f"Accepted now: {off}; the rest needs {capability.replace('{value}', 'named')}.")
    if key.switch:
        values = one_of([value_text(value) for value in wanted_values(key.switch)])
        parts.append(f"Has effect with {key.switch[0]}={values}.")
    return " ".join(parts)


def _limits(leaf: Leaf) -> str:
    key = leaf.key
    low = (
        f"at least {key.minimum:g}"
        if key.minimum is not None
        else f"above {key.above:g}"
        if key.above is not None
        else ""
    )
    high = (
        f"at most {key.maximum:g}"
        if key.maximum is not None
        else f"below {key.below:g}"
        if key.below is not None
        else ""
    )
    text = " and ".join(part for part in (low, high) if part)
    return text[:1].upper() + text[1:] + "." if text else ""


def _row(leaf: Leaf) -> str:
    cells = (f"`{leaf.name}`", _type(leaf), f"`{value_text(leaf.default)}`", _help(leaf))
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


def _changed() -> str:
    rows = [
        f"| `{leaf.name}` | `{value_text(leaf.key.was)}` | `{value_text(leaf.default)}` | {leaf.key.why} |\n"
        for leaf in tree().values()
        if leaf.key.was is not UNCHANGED
    ]
    return f"{_CHANGED}\n| key | was | is | because |\n|---|---|---|---|\n{''.join(rows)}"


_INTRODUCTION = """# Every key

Generated from the config's dataclasses by `python -m skyrl_train.config.reference > docs/config.md`; `skyrl config`
prints the same. Keys are set on the command line (`trainer.seed=7`), in a YAML file (`--config-dir DIR --config-name
NAME`), or by an experiment (`+experiment=NAME`). `+` and `++` before a key are allowed and change nothing.

A key that is accepted does what it says. A value that nothing would act on is refused, with the reason and the key to
use instead. `${other.key}` as a default means: the value of that key. `-1` and `0` both turn an interval off.
"""
_ENVS = """## Settings of any env

`environment.skyrl_gym.<env>.<setting>` may be written for an env of any name: ours, skyrl-gym's, or your own. The
sub-section is handed to the env as its settings, and the env refuses what it does not know.
"""
_CHANGED = """## Defaults that differ from the public skyrl_train packages
"""

if __name__ == "__main__":
    print(markdown(), end="")
