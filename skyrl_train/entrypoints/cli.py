"""The short command: ``skyrl train | generate | warmup | data | check | config``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from skyrl_train.errors import SkyRLError

USAGE = """\
skyrl train    a.b=c ...      train (the same as python -m skyrl_train.entrypoints.main_base)
skyrl generate a.b=c ...      generate and score only
skyrl warmup   --data ...     make a tiny model and train it on worked answers
skyrl data     NAME --out DIR prepare a data set
skyrl check    FAMILY MY:FN   try the contract of a family, such as policy_loss, on a function of your own
skyrl config   [TEXT]         every key with its type, default and meaning; TEXT keeps the keys that contain it
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand; returns the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    command = argv[0] if argv else "help"
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())  # `python -m` does so: envs and functions of users' own are looked for there
    if command in ("train", "generate"):
        return _hydra(command, argv[1:])
    commands = {"warmup": _warmup, "data": _data, "check": _check, "config": _config}
    if command not in commands:
        asked_for_help = command in ("help", "-h", "--help")
        print(USAGE if asked_for_help else f"skyrl: no subcommand '{command}'\n\n{USAGE}", end="")
        return 0 if asked_for_help else 2
    try:
        return commands[command](argv[1:])
    except SkyRLError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _hydra(command: str, argv: list[str]) -> int:
    if command == "train":
        from skyrl_train.entrypoints.main_base import main as entry
    else:
        from skyrl_train.entrypoints.main_generate import main as entry
    return entry(argv) or 0


def _warmup(argv: list[str]) -> int:
    from skyrl_train.models.warmup import add_arguments, run

    return run(_parse("warmup", add_arguments, argv))


def _data(argv: list[str]) -> int:
    from skyrl_train.data.prepare import add_arguments, run

    return run(_parse("data", add_arguments, argv))


def _check(argv: list[str]) -> int:
    from skyrl_train.algorithms.table import FAMILIES

    parser = argparse.ArgumentParser(prog="skyrl check")
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("function", help="package.module:function, or a name of the family")
    parser.add_argument("overrides", nargs="*", help="keys of the config that the function gets: a.b=c")
    asked = parser.parse_args(argv)

    from skyrl_train.algorithms.properties import check
    from skyrl_train.config.door import load_config

    config = load_config(["trainer.policy.model.path=none", *asked.overrides]).trainer.algorithm
    found = check(asked.family, asked.function, config)
    for finding in found:
        print(f"{finding.verdict:7} {finding.property}{f': {finding.detail}' if finding.detail else ''}")
    return int(any(finding.verdict == "broken" for finding in found))


def _config(argv: list[str]) -> int:
    from skyrl_train.config.reference import table

    print(table(argv[0] if argv else None))
    return 0


def _parse(command: str, add_arguments, argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=f"skyrl {command}")
    add_arguments(parser)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
