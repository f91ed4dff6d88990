"""Runs a preparer and reads what it wrote, as a training run would."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from skyrl_train.data import PromptDataset, load_prompts
from skyrl_train.data.prepare.command import prepare_data


@pytest.fixture
def prepared(tmp_path: Path) -> Callable[..., Mapping[str, PromptDataset]]:
    """Split -> prompts, read back from the files."""

    def run(name: str, **options) -> Mapping[str, PromptDataset]:
        files = prepare_data(name, tmp_path / "out", **options)
        return {split: load_prompts([str(path)]) for split, path in files.items()}

    return run
