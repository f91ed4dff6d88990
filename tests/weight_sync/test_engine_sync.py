"""The transaction against real servers: every way there, what it proves, and what it finds wrong."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
import torch
from engines.contract import PROMPT, Rig, ask, one

from skyrl_train.engines.sglang.engine import SGLangEngine
from skyrl_train.engines.sglang.payloads import LOADER
from skyrl_train.errors import EngineError, WeightSyncError
from skyrl_train.learner import model_worker
from skyrl_train.models.sharding import reshard
from skyrl_train.weight_sync import surroundings
from skyrl_train.weight_sync.engine_sync import EngineSync
from skyrl_train.weight_sync.proof import ProofFailed
from weight_sync.helpers import FAR, HERE, attach_to, one_unit_off, syncing

VERSIONS = ("0.5.17", "0.5.21")


def run(test: Callable[[], Any]) -> None:
    asyncio.run(test())


WAYS = [("auto", HERE, "ipc"), ("stock", HERE, "ipc"), ("auto", FAR, "gloo"), ("disk", FAR, "disk")]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(("wanted", "around", "used"), WAYS)
def test_every_way_to_a_server(sglang_servers, sglang_model: Rig, version: str, wanted: str, around, used: str) -> None:
    server, backend = sglang_servers(version), "auto" if wanted == "stock" else wanted

    async def main() -> None:
        attach = {"e": attach_to(server, stock=wanted == "stock")}
        async with syncing(sglang_model.folder, attach, around=around, backend=backend) as here:
            for number in (1, 2):
                here.change_policy()
                metrics = await here.sync.sync(number)
                engine = here.engines["e"]
                assert here.sync.shipment._links["e"].name == used
                assert await engine.version() == number == metrics["weight_sync/version"]
                assert await here.answers_as_the_policy(engine)
                answer = await one(here.pool, ask())
                assert answer.weight_version == number
            assert {"weight_sync/prove_s", "weight_sync/probe_s", "weight_sync/total_s"} <= set(metrics)
            assert (LOADER in here.engines["e"].facts.loaders) == (wanted != "stock")

    run(main)
    assert "own loader" not in server.log.read_text(), "every bucket fitted"


@pytest.mark.parametrize("version", VERSIONS)
def test_an_engine_reads_the_learners_own_memory(sglang_servers, sglang_model: Rig, version: str, monkeypatch) -> None:
    """As on one GPU: nothing is packed, whatever happened to that memory since."""
    monkeypatch.setattr(model_worker, "SHARD_ALONE", True)
    server = sglang_servers(version)

    async def main() -> None:
        async with syncing(sglang_model.folder, {"e": attach_to(server)}) as here:
            for number in (1, 2, 3):
                reshard(here.policy.module)
                here.change_policy()
                if number == 3:  # as ``module.to`` does
                    here.policy.module._apply(lambda t: t * 0.9 if isinstance(t, torch.nn.Parameter) else t)
                await here.sync.sync(number)
                (outline,) = here.policy.sender._outlines.values()
                assert bool(outline.own) == (number < 3), "then each has memory of its own again"
                assert await here.answers_as_the_policy(here.engines["e"])
            assert not here.pool.quarantined()

    run(main)
    assert "own loader" not in server.log.read_text(), "every bucket fitted"


@pytest.mark.parametrize("mode", ["abort", "in_place", "retract"])
def test_requests_that_run_meanwhile_are_carried_on(sglang_servers, sglang_model: Rig, mode: str) -> None:
    server = sglang_servers("0.5.21" if mode == "retract" else "0.5.17")

    async def main() -> None:
        async with syncing(sglang_model.folder, {"e": attach_to(server)}, pause_mode=mode) as here:
            await here.sync.sync(1)
            running = asyncio.create_task(here.pool.generate(ask(max_new_tokens=700)))
            await asyncio.sleep(0.3)
            here.change_policy()
            metrics = await here.sync.sync(2)
            assert metrics["weight_sync/pause_s"] < 0.9, "a server that is paused with requests left waits for a second"
            assert await here.answers_as_the_policy(here.engines["e"]), "new requests see nothing of the old cache"
            (answer,) = await running
            assert len(answer.token_ids) == len(answer.logprobs) == 700 and answer.stop_reason == "length"
            assert answer.weight_version == 1, "its oldest tokens are"
            assert not here.pool.quarantined()

    run(main)


def test_retract_is_not_used_where_it_ends_the_server(sglang_server, sglang_model: Rig) -> None:
    async def main() -> None:
        async with syncing(sglang_model.folder, {"e": attach_to(sglang_server)}, pause_mode="retract") as here:
            assert here.sync._pause_mode(here.engines["e"]) == "abort"
            running = asyncio.create_task(here.pool.generate(ask(max_new_tokens=700)))
            await asyncio.sleep(0.3)
            await here.sync.sync(3)
            assert len((await running)[0].token_ids) == 700

    run(main)


class OneUnitOff(EngineSync):
    """After the weights, one tensor of the server is changed by one unit in the last place."""

    async def _deliver(self, engines, version):  # type: ignore[no-untyped-def]
        policy = self.workers._workers._hosts[0]._object  # type: ignore[attr-defined]
        with one_unit_off(self, policy, "model.layers.1.mlp.up_proj.weight", 7):
            return await super()._deliver(engines, version)


class BucketDropped(EngineSync):
    """The third bucket never reaches the server."""

    async def _deliver(self, engines, version):  # type: ignore[no-untyped-def]
        send = self.shipment._send_bucket

        async def drop(index, bucket, name, engine):  # type: ignore[no-untyped-def]
            if index != 2:
                await send(index, bucket, name, engine)

        self.shipment._send_bucket = drop  # type: ignore[method-assign]
        return await super()._deliver(engines, version)


class CacheNotFlushed(EngineSync):
    async def _flush(self, name, engine):  # type: ignore[no-untyped-def]
        return None


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (OneUnitOff, r"1 of \d+ tensors are not what was sent: model.layers.1.mlp.gate_up_proj.weight on rank 0"),
        (BucketDropped, r"\d+ of \d+ tensors are not what was sent: model\.layers"),
        (CacheNotFlushed, r"log-probs of the probe differ .* by .* nats a token .*a prefix cache that was not flushed"),
    ],
)
def test_what_is_wrong_is_caught_and_nothing_is_served(sglang_server, sglang_model: Rig, fault, words: str) -> None:
    async def main() -> None:
        async with syncing(sglang_model.folder, {"e": attach_to(sglang_server)}) as here:
            await here.sync.sync(1)
        async with syncing(sglang_model.folder, {"e": attach_to(sglang_server)}, sync_class=fault) as here:
            here.change_policy(0.1)
            with pytest.raises(WeightSyncError, match=words):
                await here.sync.sync(2)
            assert "e" in here.pool.quarantined()
            with pytest.raises(EngineError, match="no engine serves"):
                await one(here.pool, ask())

    run(main)


def test_a_fault_that_passes_is_mended_by_sending_once_more(sglang_server, sglang_model: Rig) -> None:
    class Once(OneUnitOff):
        tries = 0

        async def _deliver(self, engines, version):  # type: ignore[no-untyped-def]
            self.tries += 1
            kind = super() if self.tries == 1 else super(OneUnitOff, self)
            return await kind._deliver(engines, version)

    async def main() -> None:
        async with syncing(sglang_model.folder, {"e": attach_to(sglang_server)}, sync_class=Once) as here:
            await here.sync.sync(5)
            assert here.sync.tries == 2 and not here.pool.quarantined()  # type: ignore[attr-defined]

    run(main)


def test_a_failed_proof_can_stop_the_run(sglang_server, sglang_model: Rig) -> None:
    async def main() -> None:
        attach = {"e": attach_to(sglang_server)}
        async with syncing(sglang_model.folder, attach, sync_class=OneUnitOff, on_proof_failure="stop") as here:
            with pytest.raises(ProofFailed, match=r"weight_proof_failure=stop"):
                await here.sync.sync(6)

    run(main)


@pytest.mark.parametrize("proof", ["digest", "probe", "off"])
def test_the_proof_can_be_chosen(sglang_server, sglang_model: Rig, proof: str) -> None:
    async def main() -> None:
        async with syncing(sglang_model.folder, {"e": attach_to(sglang_server)}, proof=proof) as here:
            metrics = await here.sync.sync(7)
            assert ("weight_sync/prove_s" in metrics) == (proof == "digest")
            assert ("weight_sync/probe_s" in metrics) == (proof == "probe")

    run(main)


def test_sleep_and_wake_around_a_sync(sglang_server, sglang_model: Rig) -> None:
    async def main() -> None:
        async with syncing(sglang_model.folder, {"e": attach_to(sglang_server)}, sleep=True) as here:
            engine = here.engines["e"]
            await here.sync.sync(1)
            await here.sync.enter_training()
            assert engine.asleep == {"weights", "kv_cache", "cuda_graph"} and engine.lost_weights
            assert here.sync.current is None
            with pytest.raises(EngineError, match="asleep"):
                await one(here.pool, ask())
            here.change_policy()
            await here.sync.sync(2)
            assert not engine.asleep and await here.answers_as_the_policy(engine)

    run(main)


def test_a_group_of_an_earlier_run_is_replaced_if_that_is_wanted(sglang_server, sglang_model: Rig) -> None:
    async def main() -> None:
        await _leave_a_group_behind()
        for override, fails in (("disable", True), ("auto", False), ("enable", False)):
            attach = {"e": attach_to(sglang_server)}
            async with syncing(sglang_model.folder, attach, around=FAR, override_group=override) as here:
                if fails:
                    with pytest.raises(WeightSyncError, match=r"phase join.*already been created"):
                        await here.sync.sync(1)
                else:
                    await here.sync.sync(1)

    async def _leave_a_group_behind() -> None:
        async with syncing(sglang_model.folder, {"e": attach_to(sglang_server)}, around=FAR) as here:
            await here.sync.sync(1)

    run(main)


def test_a_wrong_group_name_is_an_error_of_ours_and_the_server_lives(sglang_server, sglang_model: Rig) -> None:
    async def main() -> None:
        engine = await SGLangEngine.attach(sglang_server.url, key=sglang_server.key)
        with pytest.raises(EngineError, match=r"Group weight_update_group not in \[\]"):
            await engine.update_from_group("weight_update_group", [("x", "float32", (1,))])
        assert len((await one(engine, ask(PROMPT))).token_ids) == 12
        await engine.close()

    run(main)


def test_a_server_that_does_not_join_is_told_in_time_and_can_be_tried_again(
    sglang_server, sglang_model: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        attach = {"e": attach_to(sglang_server)}
        async with syncing(sglang_model.folder, attach, around=FAR, timeout=3.0) as here:

            async def never(*_: Any, **__: Any) -> None:
                await asyncio.sleep(30)

            with monkeypatch.context() as patched:
                patched.setattr(here.engines["e"], "join_group", never)
                with pytest.raises(
                    WeightSyncError, match=r"Weight sync timed out in phase join, engine http://.*weight_sync_timeout=3"
                ):
                    await here.sync.sync(1)
            assert "e" in here.pool.quarantined()
            assert await here.sync.bring_up("e", here.engines["e"]) is False, "it stands by for the next sync"
            await here.sync.sync(2)
            assert not here.pool.quarantined()

    run(main)


def test_an_adapter_is_synced_alone(sglang_server, sglang_model: Rig) -> None:
    lora = ("trainer.policy.model.lora.rank=8", "trainer.policy.model.lora.target_modules=[q_proj,v_proj]")

    async def main() -> None:
        for around in (HERE, FAR):
            folder = str(sglang_model.folder.with_name("adapter"))
            async with syncing(
                sglang_model.folder, {"e": attach_to(sglang_server)}, around=around, overrides=lora, adapters=True,
                adapter_folder=folder,
            ) as here:  # fmt: skip
                engine = here.engines["e"]
                for number in (1, 2, 3):
                    here.change_policy(0.2)
                    metrics = await here.sync.sync(number)
                    assert engine.adapter == f"policy-v{number}"
                    assert ("weight_sync/pack_s" in metrics) == (number == 1), "the base travels once"
                    assert await here.answers_as_the_policy(engine)
                with pytest.raises(EngineError, match="unloaded"):
                    await one(engine, ask(extra={"lora_path": "policy-v2"}))

    run(main)


@pytest.mark.parametrize("proof", ["both", "digest"])  # of an adapter there are no digests: the probe runs all the same
def test_a_stale_adapter_is_caught(sglang_server, sglang_model: Rig, proof: str) -> None:
    lora = ("trainer.policy.model.lora.rank=8",)

    async def main() -> None:
        attach = {"e": attach_to(sglang_server)}
        async with syncing(sglang_model.folder, attach, overrides=lora, adapters=True, proof=proof) as here:
            here.change_policy(0.2)
            await here.sync.sync(1)
            assert here.sync.adapters is not None
            load = here.sync.adapters._load

            async def loads_the_old_one(name, engine, version):  # type: ignore[no-untyped-def]
                """The adapter is loaded, and requests go on naming the one before."""
                before = engine.adapter
                await load(name, engine, version)
                engine.use_adapter(before)

            here.sync.adapters._load = loads_the_old_one  # type: ignore[method-assign]
            here.change_policy(0.2)
            with pytest.raises(WeightSyncError, match="log-probs of the probe differ"):
                await here.sync.sync(2)

    run(main)


def test_links_are_chosen_by_what_each_server_can_reach() -> None:
    from dataclasses import replace

    from skyrl_train.engines.sglang.facts import ServerFacts
    from skyrl_train.errors import ConfigError

    groups = frozenset({"/init_weights_update_group"})
    gpu = ServerFacts(url="http://h:1", version="0.5.17", endpoints=groups)
    cpu = replace(gpu, device="cpu")
    on_gpu = replace(HERE, learner_device="cuda")
    shared = replace(on_gpu, same_gpu=True)
    table = [
        (cpu, HERE, "auto", "ipc"), (cpu, FAR, "auto", "gloo"), (cpu, FAR, "disk", "disk"), (cpu, HERE, "gloo", "gloo"),
        (gpu, shared, "auto", "ipc"), (gpu, shared, "nccl", "ipc"), (gpu, on_gpu, "auto", "nccl"),
        (gpu, replace(on_gpu, launched=False), "auto", "nccl"), (gpu, replace(on_gpu, same_host=False), "auto", "nccl"),
        (cpu, replace(on_gpu, launched=False), "auto", "gloo"), (gpu, on_gpu, "ipc", "ipc"),
        (replace(gpu, pipeline_parallel=2), on_gpu, "auto", "disk"),
        (replace(gpu, pipeline_parallel=2), shared, "auto", "ipc"),
        (replace(gpu, data_parallel=2), shared, "auto", "disk"),
        (replace(gpu, data_parallel=2, attention_data_parallel=True), on_gpu, "auto", "nccl"),
        (replace(gpu, endpoints=frozenset()), on_gpu, "auto", "disk"),
    ]  # fmt: skip
    for facts, around, wanted, used in table:
        assert surroundings.choose(wanted, facts, around) == used, (facts, around, wanted)
    for facts, around, wanted in ((cpu, FAR, "nccl"), (cpu, FAR, "ipc"), (gpu, shared, "gloo")):
        with pytest.raises(
            ConfigError, match=rf"weight_sync_backend='{wanted}': cannot reach http://h:1.*Set it to auto"
        ):
            surroundings.choose(wanted, facts, around)
