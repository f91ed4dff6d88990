"""What a sync leaves out with servers of ours, and what shows that it may: against real servers."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch
from engines.contract import Rig, ask, one

from skyrl_train.engines.sglang.payloads import unpack
from skyrl_train.learner import model_worker
from weight_sync.helpers import FAR, HERE, attach_to, syncing


@pytest.mark.parametrize(("around", "busy", "paused"), [(HERE, False, 0), (FAR, False, 1), (HERE, True, 1)])
def test_an_idle_server_of_ours_is_not_paused(
    sglang_server, sglang_model: Rig, around, busy: bool, paused: int, monkeypatch, caplog
) -> None:
    """Unless somebody else's request makes the flush fail."""

    async def main() -> None:
        async with syncing(
            sglang_model.folder, {"e": attach_to(sglang_server)}, around=around, bucket_bytes=1 << 24
        ) as here:
            engine, calls = here.engines["e"], []
            post, flush = engine._post, engine.flush
            await here.sync.sync(1)
            here.change_policy()

            async def noted(path: str, *args: Any, **options: Any) -> Any:
                calls.append(path)
                return await post(path, *args, **options)

            monkeypatch.setattr(engine, "_post", noted)
            monkeypatch.setattr(engine, "flush", lambda wait=5.0: flush(min(wait, 0.2)))
            stranger = await attach_to(sglang_server)()

            async def others(length: int) -> None:
                """One request after the other, until one is aborted."""
                while (await one(stranger, ask(max_new_tokens=length))).stop_reason != "abort":
                    pass

            running = asyncio.gather(*map(others, (500, 700, 900) if busy else ()))
            await asyncio.sleep(0.3)
            await here.sync.sync(2)
            assert calls.count("/pause_generation") == calls.count("/continue_generation") == paused
            assert await here.answers_as_the_policy(engine) and not here.pool.quarantined()
            assert ("was thought idle" in caplog.text) == busy
            await asyncio.wait_for(running, 30)
            await stranger.close()

    asyncio.run(main())


@pytest.mark.parametrize("own", [True, False])
def test_our_loaders_word_is_taken_once_it_agreed_with_sglangs(
    sglang_server, sglang_model: Rig, own: bool, monkeypatch, caplog
) -> None:
    """And what differs by one unit is found by it too; then SGLang is asked again."""
    monkeypatch.setattr(model_worker, "SHARD_ALONE", own)
    name = "model.layers.1.mlp.up_proj.weight"

    async def main() -> None:
        async with syncing(sglang_model.folder, {"e": attach_to(sglang_server)}) as here:
            engine, asked, phases, spoilt = here.engines["e"], [], [], []
            checker, finish, send = engine.weights_checksum, here.sync._finish, here.sync.shipment._send_bucket

            async def ask_sglang() -> dict[str, Any]:
                asked.append(await checker())
                return asked[-1]

            async def then_finish(run, version) -> None:  # type: ignore[no-untyped-def]
                phases.append(set(run.seconds))
                await finish(run, version)

            async def spoil(index, bucket, *to) -> None:  # type: ignore[no-untyped-def]
                """Once, the engine reads other bytes than those of the digests."""
                names = [spec.name for spec in bucket]
                if spoilt or name not in names:
                    return await send(index, bucket, *to)
                await asyncio.sleep(0.5)  # the digests are taken meanwhile
                tensor = unpack(bucket, here.policy.sender._alive[index][0])[names.index(name)]
                spoilt.append(tensor.view(-1).view(torch.int32)[7].add_(1))
                await send(index, bucket, *to)

            monkeypatch.setattr(engine, "weights_checksum", ask_sglang)
            monkeypatch.setattr(here.sync, "_finish", then_finish)
            for number in (1, 2, 3):
                here.change_policy()
                await here.sync.sync(number)
                assert len(asked) == 1 and ("prove" in phases[-1]) == (number == 1), "then it is compared last"
            assert here.sync.shipment._digests.taken[engine] == 2
            monkeypatch.setattr(here.sync.shipment, "_send_bucket", spoil)
            await here.sync.sync(4)
            assert len(asked) == 2 and not here.pool.quarantined(), "sent once more, and SGLang asked"
            assert "1 of" in caplog.text and "model.layers.1.mlp.gate_up_proj.weight on rank 0" in caplog.text
            assert await here.answers_as_the_policy(engine)

    asyncio.run(main())
