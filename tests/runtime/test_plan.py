"""Who sits where: whole plans, and what is said where there is no room."""

from __future__ import annotations

import time
from collections.abc import Sequence

import pytest

from skyrl_train.config.door import load_config
from skyrl_train.config.preflight import preflight
from skyrl_train.errors import ConfigError
from skyrl_train.runtime.plan import Node, Plan, make_plan

ALL = ("policy", "ref", "critic")
EIGHTS = [Node(name=name, cpus=64, gpus=8) for name in "ab"]
P = "trainer.placement"
G = "generator"


def planned(nodes: Sequence[Node], *overrides: str, roles: Sequence[str] = ("policy",), sglang: bool = True) -> Plan:
    backend = [f"{G}.backend=sglang"] if sglang else []
    config = load_config(["trainer.policy.model.path=m/m", "data.train_data=[a.jsonl]", *backend, *overrides])
    return make_plan(config, nodes, roles)


def at(plan: Plan, role: str) -> list[tuple[int, int]]:
    return [(seat.node, *seat.slots) for seat in plan.seats(role)]  # type: ignore[misc]


def engines(plan: Plan) -> list[tuple[int, tuple[int, ...]]]:
    return [(seat.node, seat.slots) for seat in plan.engines]


def sized(policy: str, **others: str) -> list[str]:
    """``sized("2x4", ref="1x2")``: nodes x GPUs on each."""
    return [
        f"{P}.{role}_{key}={number}"
        for role, size in {"policy": policy, **others}.items()
        for key, number in zip(("num_nodes", "num_gpus_per_node"), size.split("x"), strict=True)
    ]


def test_one_gpu_holds_everything() -> None:
    plan = planned([Node(name="a", gpus=1)], roles=ALL)
    assert [at(plan, role) for role in ALL] == [[(0, 0)]] * 3 and engines(plan) == [(0, (0,))]
    assert plan.slots() == {0: 1} and all(map(plan.with_engines, ALL))


def test_eight_gpus_colocated() -> None:
    plan = planned(EIGHTS[:1], *sized("1x8", critic="1x8"), f"{G}.num_inference_engines=4",
                   f"{G}.inference_engine_tensor_parallel_size=2", roles=ALL)  # fmt: skip
    assert at(plan, "policy") == at(plan, "critic") == [(0, n) for n in range(8)]
    assert at(plan, "ref") == at(plan, "policy"), "as the policy, if nothing is said"
    assert engines(plan) == [(0, (0, 1)), (0, (2, 3)), (0, (4, 5)), (0, (6, 7))]


@pytest.mark.parametrize(("sizes", "workers"), [((1, 2, 1), 2), ((1, 2, 2), 4), ((1, 8, 1), 8), ((3, 1, 1), 3)])
def test_without_a_word_the_policy_has_the_gpus_that_its_engines_need(monkeypatch, sizes, workers) -> None:
    monkeypatch.setattr("skyrl_train.config.derive.on_gpu", lambda config: True)
    names = (
        "num_inference_engines",
        "inference_engine_tensor_parallel_size",
        "inference_engine_pipeline_parallel_size",
    )
    plan = planned(EIGHTS[:1], *(f"{G}.{name}={size}" for name, size in zip(names, sizes, strict=True)))
    assert at(plan, "policy") == [(0, gpu) for gpu in range(workers)]
    assert sum(len(slots) for _, slots in engines(plan)) == workers


def test_where_no_engine_has_room_it_is_not_said_to_set_one(monkeypatch) -> None:
    with pytest.raises(ConfigError, match=r"room for 0\. Set smaller generator\.inference_engine"):
        planned(EIGHTS[:1], *sized("1x1"), f"{G}.inference_engine_tensor_parallel_size=2")


def test_on_two_nodes_each_nodes_engines_lie_on_its_own_learner() -> None:
    plan = planned(
        EIGHTS, *sized("2x4"), f"{G}.num_inference_engines=4", f"{G}.inference_engine_tensor_parallel_size=2"
    )
    assert at(plan, "policy") == [(node, gpu) for node in range(2) for gpu in range(4)]
    assert engines(plan) == [(0, (0, 1)), (0, (2, 3)), (1, (0, 1)), (1, (2, 3))]
    assert plan.slots() == {0: 4, 1: 4}
    few = planned(EIGHTS, *sized("2x8"), f"{G}.num_inference_engines=2", f"{G}.inference_engine_tensor_parallel_size=4")
    assert engines(few) == [(0, (0, 1, 2, 3)), (1, (0, 1, 2, 3))]


def test_engines_apart_come_after_the_learner_and_never_lie_on_two_nodes() -> None:
    sizes = (f"{G}.inference_engine_tensor_parallel_size=2", f"{G}.inference_engine_pipeline_parallel_size=2")
    plan = planned(EIGHTS, *sized("1x3"), f"{P}.colocate_all=false", f"{G}.num_inference_engines=3", *sizes)
    assert engines(plan) == [(0, (3, 4, 5, 6)), (1, (0, 1, 2, 3)), (1, (4, 5, 6, 7))]
    assert plan.slots() == {0: 7, 1: 8} and not plan.with_engines("policy")


def test_copies_of_the_model_are_engines() -> None:
    plan = planned(EIGHTS[:1], *sized("1x4"), f"{G}.inference_engine_data_parallel_size=2",
                   f"{G}.num_inference_engines=2")  # fmt: skip
    assert engines(plan) == [(0, (n,)) for n in range(4)]


def test_reference_and_critic_apart() -> None:
    apart = (f"{P}.colocate_policy_ref=false", f"{P}.colocate_policy_critic=false")
    plan = planned(EIGHTS, *sized("1x4", ref="1x2", critic="2x2"), *apart, roles=ALL, sglang=False)
    assert at(plan, "policy") == [(0, n) for n in range(4)] and at(plan, "ref") == [(0, 4), (0, 5)]
    assert at(plan, "critic") == [(0, 6), (0, 7), (1, 0), (1, 1)]  # two nodes are two nodes
    plan = planned(EIGHTS[:1], *sized("1x2", ref="1x1"), apart[0], roles=("policy", "ref"))
    assert at(plan, "ref") == [(0, 2)] and plan.with_engines("policy") and not plan.with_engines("ref")


def test_nodes_that_are_too_small_are_passed_over() -> None:
    nodes = [Node(name="head", cpus=4), Node(name="small", gpus=2), *EIGHTS]
    assert at(planned(nodes, *sized("1x4")), "policy") == [(2, n) for n in range(4)]


def test_without_gpus_there_is_room_by_cpus_and_engines_spread_over_the_policys_nodes() -> None:
    nodes = [Node(name="head", cpus=0), Node(name="a", cpus=2), Node(name="b", cpus=2)]
    plan = planned(nodes, *sized("2x1"), f"{G}.num_inference_engines=2", "trainer.device=cpu")
    assert at(plan, "policy") == [(1, 0), (2, 0)] and engines(plan) == [(1, (0,)), (2, (0,))]
    assert plan.slots() == {1: 1, 2: 1} and not plan.on_gpu
    apart = planned(nodes, f"{G}.num_inference_engines=3", f"{P}.colocate_all=false", "trainer.device=cpu")
    assert at(apart, "policy") == [(1, 0)] and engines(apart) == [(1, (1,)), (2, (0,)), (2, (1,))]
    here = planned([Node(name="here")], *sized("1x16"), "trainer.device=cpu")  # this machine: as many as one likes
    assert len(here.seats("policy")) == 16


def test_the_rest_of_the_roles_sit_beside_the_policy() -> None:
    assert at(planned(EIGHTS), "adder") == [(0, 0)]


def test_the_plan_can_be_read() -> None:
    text = str(planned(EIGHTS, *sized("2x1"), f"{G}.num_inference_engines=2"))
    assert text == "policy 0: a GPU 0; policy 1: b GPU 0; engine 0: a GPU 0; engine 1: b GPU 0"


FULL = [
    (EIGHTS, sized("1x16"), f"{P}.policy_num_gpus_per_node", 16, "1 node(s) with 16 GPU each, and 0 node(s)"),
    (EIGHTS, sized("3x8"), f"{P}.policy_num_nodes", 3, "3 node(s) with 8 GPU each, and 2 node(s)"),
    ([Node(name="a", gpus=1)], sized("2x1"), f"{P}.policy_num_nodes", 2, "runtime=ray"),
    ([Node(name="a", cpus=4)], ["trainer.device=cuda"], f"{P}.policy_num_gpus_per_node", 1, "There: a: 4 CPU, 0 GPU"),
    ([Node(name="a", cpus=1)], sized("1x2"), f"{P}.policy_num_gpus_per_node", 2, "2 CPU each"),
    (EIGHTS, [*sized("1x8"), f"{P}.colocate_all=false", f"{G}.num_inference_engines=9"],
     f"{G}.num_inference_engines", 9, "there is room for 8. There: a: 64 CPU, 8 GPU; b: 64 CPU, 8 GPU"),
    (EIGHTS, [*sized("1x1"), f"{P}.colocate_all=false", f"{G}.inference_engine_tensor_parallel_size=16"],
     f"{G}.num_inference_engines", 1, "16 GPU of one node each"),
    (EIGHTS, [*sized("2x2"), f"{G}.num_inference_engines=2", f"{G}.inference_engine_tensor_parallel_size=4"],
     f"{G}.num_inference_engines", 2, "2 node(s) with 2 GPU(s) each, room for 0"),
]  # fmt: skip


@pytest.mark.parametrize(("nodes", "keys", "key", "value", "told"), FULL)
def test_what_does_not_fit_is_refused_at_once(
    nodes: list[Node], keys: list[str], key: str, value: int, told: str
) -> None:
    begun = time.monotonic()
    with pytest.raises(ConfigError) as raised:
        planned(nodes, *keys)
    error = raised.value
    assert (error.key, error.value) == (key, value) and told in str(error) and error.remedy
    assert time.monotonic() - begun < 2


def test_several_nodes_may_be_colocated() -> None:
    keys = ("trainer.policy.model.path=m/m", "data.train_data=[a.jsonl]", "trainer.eval_interval=-1")
    more = (f"{G}.backend=sglang", "trainer.eval_before_train=false")
    preflight(load_config([*keys, *more, *sized("2x8", ref="2x8")]))


def test_nothing_is_planned_for_engines_that_others_run() -> None:
    plan = planned(EIGHTS, f"{G}.run_engines_locally=false", f"{G}.remote_inference_engine_urls=[h:1]")
    assert plan.engines == ()
    assert planned(EIGHTS, sglang=False, roles=ALL).engines == ()
