"""What the tests of the config share: a config that passes, and the interface files beside the repository."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
INTERFACE = ROOT.parent / "shared" / "interface"
GOOD = ["trainer.policy.model.path=org/model"]
"""The one thing a config must say."""


def interface_file(name: str) -> Path:
    path = INTERFACE / name
    if not path.is_file():
        pytest.skip(f"{name} is not beside the repository")
    return path


@pytest.fixture(scope="session")
def public_keys() -> dict[str, Any]:
    return json.loads(interface_file("skyrl_keys.json").read_text())


@pytest.fixture(scope="session")
def faq() -> str:
    return interface_file("FAQ_SGLANG.md").read_text()
