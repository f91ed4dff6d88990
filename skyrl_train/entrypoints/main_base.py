"""``python -m skyrl_train.entrypoints.main_base KEY=VALUE ...``: train."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from skyrl_train.config import door
from skyrl_train.config.schema import Config


def main(argv: Sequence[str] | None = None) -> int:
    """Trains; returns the exit code."""
    return door.run(_train, argv)


def _train(config: Config, run_folder: Path) -> None:
    from skyrl_train.build import train  # loads torch
    from skyrl_train.tracking.logs import setup_logging

    setup_logging(folder=run_folder)
    train(config, run_folder)


if __name__ == "__main__":
    sys.exit(main())
