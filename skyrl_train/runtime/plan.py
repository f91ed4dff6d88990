"""Who sits where: a pure function of the config and of the nodes that there are.

A slot is a GPU of a node; without GPUs, room for one worker. Slots are numbered from 0 on each node:

    2 nodes x 4 GPUs, colocate_all, TP 2              1 node x 8 GPUs, apart, TP 2
    node 0   policy 0 1 2 3   engines 0 0 1 1         policy 0 1 2 3   engines - - - - 0 0 1 1
    node 1   policy 4 5 6 7   engines 2 2 3 3

Models that share slots (the policy, the critic where ``colocate_policy_critic``, the reference where
``colocate_policy_ref``) lie over each other from slot 0 on; those apart come after them, and engines apart last.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from skyrl_train.config.backend import resolve_backend
from skyrl_train.config.sizes import engines_of, workers_of
from skyrl_train.errors import ConfigError

if TYPE_CHECKING:
    from skyrl_train.config.schema import Config

SECTION = "trainer.placement"
ENGINES = "generator.num_inference_engines"


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A machine of the cluster, or what is free of it."""

    name: str
    cpus: float | None = None
    """Room for workers without a GPU; None: as many as one likes."""
    gpus: int = 0

    def __str__(self) -> str:
        cpus = "" if self.cpus is None else f"{self.cpus:g} CPU, "
        return f"{self.name}: {cpus}{self.gpus} GPU"


@dataclass(frozen=True, slots=True, kw_only=True)
class Seat:
    """Of one worker, or of one engine."""

    node: int
    """Its place in ``Plan.nodes``."""
    slots: tuple[int, ...] = (0,)
    """On that node; several only for an engine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The seats of a run."""

    nodes: tuple[Node, ...]
    on_gpu: bool
    roles: Mapping[str, tuple[Seat, ...]] = field(default_factory=dict)
    """By role, the seat of each rank."""
    engines: tuple[Seat, ...] = ()
    """The seat of each replica that we start."""

    def seats(self, role: str) -> tuple[Seat, ...]:
        """Of the role's ranks; a role that the plan does not know has one, beside the policy's first."""
        return self.roles.get(role) or self.roles.get("policy", ())[:1] or (Seat(node=0),)

    def slots(self) -> dict[int, int]:
        """By node that is used, how many of its slots the run needs, counted from 0."""
        found: dict[int, int] = {}
        for seat in (*(s for seats in self.roles.values() for s in seats), *self.engines):
            found[seat.node] = max(found.get(seat.node, 0), max(seat.slots) + 1)
        return dict(sorted(found.items()))

    def with_engines(self, role: str) -> bool:
        """Whether a model of this role lies on slots of engines."""
        taken = {(seat.node, slot) for seat in self.engines for slot in seat.slots}
        return any((seat.node, slot) in taken for seat in self.seats(role) for slot in seat.slots)

    def __str__(self) -> str:
        lines = [(f"{role} {rank}", seat) for role, seats in self.roles.items() for rank, seat in enumerate(seats)]
        lines += [(f"engine {index}", seat) for index, seat in enumerate(self.engines)]
        kind = "GPU" if self.on_gpu else "slot"
        return "; ".join(
            f"{name}: {self.nodes[seat.node].name} {kind} {','.join(map(str, seat.slots))}" for name, seat in lines
        )


def make_plan(config: Config, nodes: Sequence[Node], roles: Sequence[str] = ("policy",)) -> Plan:
    """Gives a seat to every worker of ``roles`` and to every engine that we start.

    Args:
        nodes: what there is, in the order in which it is to be used.
        roles: the models that the run has: "policy", "ref", "critic".

    Raises:
        ConfigError: the nodes cannot hold it; says what is asked and what is there.
    """
    device = config.trainer.device
    on_gpu = device == "cuda" or (device == "auto" and any(node.gpus for node in nodes))
    space = _Space(nodes, on_gpu)
    placement = config.trainer.placement
    together = [role for role in roles if role == "policy" or getattr(placement, f"colocate_policy_{role}")]
    seats = space.take(config, together)
    for role in roles:
        if role not in together:
            seats |= space.take(config, [role])
    engines: tuple[Seat, ...] = ()
    if config.generator.run_engines_locally and resolve_backend(config) != "embedded":
        engines = _on_the_policys(config, seats["policy"], on_gpu) if placement.colocate_all else space.engines(config)
    return Plan(nodes=tuple(nodes), on_gpu=on_gpu, roles={role: seats[role] for role in roles}, engines=engines)


class _Space:
    """What is still free: on each node, the slots from some number on."""

    def __init__(self, nodes: Sequence[Node], on_gpu: bool) -> None:
        self.nodes, self.on_gpu, self.used = list(nodes), on_gpu, [0] * len(nodes)

    def take(self, config: Config, roles: Sequence[str]) -> dict[str, tuple[Seat, ...]]:
        """Slots on as many nodes as the roles ask for, which they share."""
        asked = {role: workers_of(config, role) for role in roles}
        count, each = (max(sizes) for sizes in zip(*asked.values(), strict=True))
        chosen = [n for n in range(len(self.nodes)) if self._free(n) >= each][:count]
        if len(chosen) < count:
            role = max(roles, key=lambda r: asked[r])
            key = "num_nodes" if len(self.nodes) < asked[role][0] else "num_gpus_per_node"
            raise self._full(
                f"{SECTION}.{role}_{key}", asked[role][key != "num_nodes"],
                f"the {' + '.join(roles)} workers ask for {count} node(s) with {each} {self._kind} each, and "
                f"{len(chosen)} node(s) have as many free.",
                f"Lower {SECTION}.{role}_num_nodes or {role}_num_gpus_per_node, or add nodes (several nodes need "
                f"{SECTION}.runtime=ray).",
            )  # fmt: skip
        first = {node: self.used[node] for node in chosen}
        for node in chosen:
            self.used[node] += each
        return {
            role: tuple(Seat(node=n, slots=(first[n] + i,)) for n in chosen[:number] for i in range(width))
            for role, (number, width) in asked.items()
        }

    def engines(self, config: Config) -> tuple[Seat, ...]:
        """The next free slots for each engine; without GPUs, engine after engine on node after node."""
        count, each = engines_of(config)
        seats: list[Seat] = []
        for index in range(count):
            order = range(len(self.nodes)) if self.on_gpu else _turned(len(self.nodes), index)
            width = each if self.on_gpu else 1  # its ranks share the cores
            node = next((n for n in order if self._free(n) >= width), None)
            if node is None:
                raise self._full(
                    ENGINES, config.generator.num_inference_engines,
                    f"{count} engine(s) ask for {each} {self._kind} of one node each (tensor x pipeline parallel "
                    f"size) beside the learner, and there is room for {index}.",
                    f"Lower {ENGINES} or generator.inference_engine_tensor_parallel_size, or let engines share the "
                    f"learner's GPUs: {SECTION}.colocate_all=true.",
                )  # fmt: skip
            seats.append(Seat(node=node, slots=tuple(range(self.used[node], self.used[node] + width))))
            self.used[node] += width
        return tuple(seats)

    @property
    def _kind(self) -> str:
        return "GPU" if self.on_gpu else "CPU"

    def _free(self, node: int) -> float:
        here = self.nodes[node]
        room = here.gpus if self.on_gpu else float("inf") if here.cpus is None else here.cpus
        return room - self.used[node]

    def _full(self, key: str, value: int, why: str, remedy: str) -> ConfigError:
        there = "; ".join(map(str, self.nodes)) or "no node"
        return ConfigError(key, value, f"the cluster cannot hold it: {why} There: {there}.", remedy)


def _on_the_policys(config: Config, policy: Sequence[Seat], on_gpu: bool) -> tuple[Seat, ...]:
    """Engines spread evenly over the policy's nodes, on its own slots there."""
    count, each = engines_of(config)
    slots: dict[int, list[int]] = {}
    for seat in policy:
        slots.setdefault(seat.node, []).extend(seat.slots)
    nodes = list(slots)
    if not on_gpu:
        return tuple(Seat(node=nodes[i * len(nodes) // count], slots=(slots[nodes[0]][0],)) for i in range(count))
    room = sum(len(there) // each for there in slots.values())
    if count > room:
        fewer = f"Set {ENGINES}={room}, other" if room else "Set smaller"
        raise ConfigError(
            ENGINES, config.generator.num_inference_engines,
            f"{count} engine(s) ask for {each} GPU(s) of one node each (tensor x pipeline parallel size). With "
            f"{SECTION}.colocate_all=true they share the policy's: {len(nodes)} node(s) with "
            f"{len(slots[nodes[0]])} GPU(s) each, room for {room}.",
            f"{fewer} generator.inference_engine_*_parallel_size, more {SECTION}.policy_num_gpus_per_node, or "
            f"{SECTION}.colocate_all=false.",
        )  # fmt: skip
    seats = []
    for index in range(count):
        node = nodes[index * len(nodes) // count]
        mine, slots[node] = slots[node][:each], slots[node][each:]
        seats.append(Seat(node=node, slots=tuple(mine)))
    return tuple(seats)


def _turned(count: int, by: int) -> list[int]:
    """``0 .. count-1``, beginning with another."""
    return [(by + n) % count for n in range(count)]
