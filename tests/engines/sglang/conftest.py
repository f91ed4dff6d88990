"""Short names for the shared model and server."""

from __future__ import annotations

import pytest

from engines.contract import Rig
from skyrl_train.engines.sglang.launch import SGLangServer


@pytest.fixture(scope="session")
def rig(sglang_model: Rig) -> Rig:
    return sglang_model


@pytest.fixture(scope="session")
def server(sglang_server: SGLangServer) -> SGLangServer:
    return sglang_server
