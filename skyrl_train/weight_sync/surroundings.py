"""How an engine lies to the learner, and by which kind of link (``links.py``) it is reached."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from skyrl_train.engines.sglang.facts import ServerFacts
from skyrl_train.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What decides how one engine is reached."""

    launched: bool
    """We started it."""
    same_host: bool
    """The policy's worker that sends runs on the engine's host."""
    same_gpu: bool
    """The engine has that worker's GPU."""
    learner_device: str
    sender: int = 0
    """Rank of that worker."""

    @classmethod
    def of(cls, host: str | None, gpus: Sequence[str], workers: Sequence[Mapping[str, Any]]) -> Surroundings:
        """How an engine lies to the policy: the worker on its GPU sends, else one on its host, else the first.

        Args:
            host: identity of the engine's host; None: somebody else started it, somewhere.
            gpus: UUIDs of the engine's.
            workers: what ``WeightSender.describe`` says on each rank.
        """

        def nearness(rank: int) -> tuple[bool, bool, int]:
            worker = workers[rank]
            return worker["host"] == host, worker["host"] == host and worker["gpu"] in gpus, -rank

        sender = max(range(len(workers)), key=nearness)
        same_host, same_gpu, _ = nearness(sender)
        return cls(
            launched=host is not None, same_host=same_host, same_gpu=same_gpu,
            learner_device=workers[sender]["device"], sender=sender,
        )  # fmt: skip


def choose(wanted: str, facts: ServerFacts, around: Surroundings) -> str:
    """The link to one engine: "ipc", "nccl", "gloo" or "disk".

    Args:
        wanted: ``generator.weight_sync_backend``.

    Raises:
        ConfigError: what is wanted cannot reach this engine.
    """
    both_on_gpu = facts.device == "cuda" and around.learner_device == "cuda"
    shares = around.launched and around.same_host and facts.device == around.learner_device
    near = shares and (around.same_gpu or not both_on_gpu)
    in_groups = facts.pipeline_parallel == 1 and "/init_weights_update_group" in facts.endpoints
    if facts.replicated:  # SGLang takes such weights from disk alone
        possible = ["disk"]
    else:
        # Two ranks of one group cannot share a GPU, so what shares the learner's is near, and nothing else is tried.
        far = [] if not in_groups or (near and both_on_gpu) else ["nccl", "gloo"] if both_on_gpu else ["gloo"]
        possible = [*(["ipc"] if near else []), *far, "disk"]
    if wanted == "auto" or (wanted == "nccl" and possible[0] == "ipc" and both_on_gpu):
        return possible[0]
    if wanted in possible or (wanted == "ipc" and shares):
        return wanted
    raise ConfigError(
        "generator.weight_sync_backend", wanted,
        f"cannot reach {facts.url} ({facts.device}, TP {facts.tensor_parallel}, PP {facts.pipeline_parallel}, "
        f"DP {facts.data_parallel}, started by {'us' if around.launched else 'somebody'}, on "
        f"{'the' if around.same_host else 'another'} host of the learner, which is on {around.learner_device}).",
        f"Set it to auto, or to {' or '.join(possible)}.",
    )  # fmt: skip
