"""Ray clusters on this machine: one for all tests of a session, as starting one takes seconds, and of two nodes."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from typing import Any

import pytest

CPUS = 8
"""Which Ray counts: no test waits for another's, however few cores there are."""


def start_cluster(**head: Any) -> Any:
    """A Ray cluster of one node, to which others can be added. It writes where no other session looks."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster  # noqa: TID251 - a run joins clusters, and starts none of several nodes

    if "RAY_TMPDIR" not in os.environ:
        os.environ["RAY_TMPDIR"] = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # paths of sockets must be short
        atexit.register(shutil.rmtree, os.environ["RAY_TMPDIR"], ignore_errors=True)
    os.environ.setdefault("RAY_enable_worker_prestart", "0")  # as a run does: idle processes only take time
    return Cluster(initialize_head=True, head_node_args={"include_dashboard": False, **head})


@pytest.fixture(scope="session")
def ray_address() -> Iterator[str]:
    """``host:port`` of a cluster on this machine. Commands join it by ``RAY_ADDRESS``."""
    cluster = start_cluster(num_cpus=CPUS)
    yield cluster.address
    cluster.shutdown()


@pytest.fixture(scope="session")
def ray_cluster(ray_address: str) -> Iterator[None]:
    """The cluster, joined by this process as a run joins it."""
    import ray  # noqa: TID251 - to leave it

    from skyrl_train.runtime.ray_cluster import connect

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray's own, of its own start
        connect(ray_address)
        yield
        ray.shutdown()
