"""``python -m skyrl_train.entrypoints.main_generate KEY=VALUE ...``: generate from ``data.val_data`` and score."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from skyrl_train.config import door
from skyrl_train.config.schema import Config


def main(argv: Sequence[str] | None = None) -> int:
    """Generates and scores; returns the exit code."""
    return door.run(_generate, argv, purpose="generate")


def _generate(config: Config, run_folder: Path) -> None:
    from skyrl_train.build import generate  # loads torch
    from skyrl_train.tracking.logs import setup_logging

    setup_logging(folder=run_folder)
    generate(config, run_folder)


if __name__ == "__main__":
    sys.exit(main())
