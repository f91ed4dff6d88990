"""Versions, pauses, sleep, weights, adapters and digests of a real server. Each test leaves it as it found it."""

from __future__ import annotations

import asyncio
import copy
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from sglang_cpu.servers import begun, push

from engines.contract import PROMPT, Rig, ask, one, plain_greedy
from skyrl_train.engines.sglang.engine import SGLangEngine
from skyrl_train.engines.sglang.facts import UNKNOWN_VERSION
from skyrl_train.engines.sglang.launch import SGLangServer
from skyrl_train.engines.sglang.payloads import adapter_payloads
from skyrl_train.errors import EngineError


@asynccontextmanager
async def attached(server: SGLangServer) -> AsyncIterator[SGLangEngine]:
    engine = await SGLangEngine.attach(server.url, key=server.key)
    try:
        yield engine
    finally:
        await engine.close()


@pytest.fixture(scope="module")
def other(rig: Rig) -> torch.nn.Module:
    """The rig's model with other weights."""
    changed = copy.deepcopy(rig.model)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return changed


def test_the_facts_of_a_server(server: SGLangServer, rig: Rig) -> None:
    async def main() -> None:
        async with attached(server) as engine:
            facts = engine.facts
            assert facts.version and facts.device == "cpu" and facts.dtype == "float32"
            assert (facts.vocabulary, facts.context_length) == (128, 1024)
            assert facts.lora and facts.incremental and not facts.deterministic and not facts.memory_saver
            assert {"/weights_checker", "/pause_generation", "/update_weights_from_tensor"} <= facts.endpoints
            assert facts.update_sessions == (facts.version >= "0.5.21")
            assert "seed" not in engine.capabilities.sampling and engine.capabilities.lora

    asyncio.run(main())


def test_without_the_key_nothing_is_told(server: SGLangServer) -> None:
    with pytest.raises(EngineError, match=r"401.*wants a key"):
        asyncio.run(SGLangEngine.attach(server.url))
    command = Path(f"/proc/{server.process._process.pid}/cmdline").read_bytes()  # type: ignore[union-attr]
    assert b"launch_server" in command and server.key.encode() not in command


def test_new_weights_sample_as_the_model_that_sent_them(server: SGLangServer, rig: Rig, other: torch.nn.Module) -> None:
    async def main() -> None:
        async with attached(server) as engine:
            before = await engine.weights_checksum()
            for model, version in ((other, 11), (rig.model, 12)):
                await push(engine, model, version)
                answer = await one(engine, ask(temperature=0.0))
                assert answer.token_ids == plain_greedy(model, PROMPT, 12)
                assert answer.weight_version == version == await engine.version()
                assert (await engine.weights_checksum() == before) == (model is rig.model)

    asyncio.run(main())


def test_a_label_that_is_no_number_is_an_unproven_version(server: SGLangServer) -> None:
    async def main() -> None:
        async with attached(server) as engine:
            await engine.client.post("/update_weight_version", {"new_version": "theirs", "abort_all_requests": False},
                                     deadline=10)  # fmt: skip
            assert await engine.version() == UNKNOWN_VERSION
            assert (await one(engine, ask())).weight_version == UNKNOWN_VERSION
            await engine.commit_weights(3)
            await engine.client.post("/update_weight_version", {"new_version": "2", "abort_all_requests": False},
                                     deadline=10)  # fmt: skip
            assert (await one(engine, ask())).weight_version == 2  # somebody moved it back

    asyncio.run(main())


@pytest.mark.parametrize("mode", ["abort", "in_place", "retract"])
def test_a_pause_holds_everything_and_loses_nothing(server: SGLangServer, rig: Rig, mode: str) -> None:
    async def main() -> None:
        async with attached(server) as engine:
            running = asyncio.create_task(one(engine, ask(max_new_tokens=600)))
            await begun(engine)
            await engine.pause(mode)  # type: ignore[arg-type]
            waiting = asyncio.create_task(one(engine, ask(temperature=0.0)))
            gone = ask()
            aborted = asyncio.create_task(one(engine, gone))
            await asyncio.sleep(0.3)
            assert not waiting.done()
            await engine.abort([gone.id])
            assert ((await aborted).stop_reason, (await aborted).token_ids) == ("abort", [])
            assert running.done() == (mode == "abort")
            await engine.resume()
            assert (await waiting).token_ids == rig.greedy[:12]
            answer = await running
            assert answer.stop_reason == ("abort" if mode == "abort" else "length")
            assert rig.gap(PROMPT, answer) < 1e-4

    asyncio.run(main())


def test_an_abort_while_paused_takes_effect_afterwards(server: SGLangServer) -> None:
    async def main() -> None:
        async with attached(server) as engine:
            request = ask(max_new_tokens=900)
            running = asyncio.create_task(one(engine, request))
            await begun(engine)
            await engine.pause("in_place")
            async with asyncio.timeout(5):
                await engine.abort([request.id])
            await engine.resume()
            assert (await running).stop_reason == "abort"

    asyncio.run(main())


def test_a_flush_is_refused_while_requests_run(server: SGLangServer) -> None:
    async def main() -> None:
        async with attached(server) as engine:
            running = asyncio.create_task(one(engine, ask(max_new_tokens=900)))
            await begun(engine)
            with pytest.raises(EngineError, match=r"flush_cache.*HTTP 400"):
                await engine.flush(wait=0)
            await engine.abort()
            await running
            await engine.flush()

    asyncio.run(main())


def test_sleep_gives_up_the_weights_and_nothing_runs_before_they_are_back(
    server: SGLangServer, rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with attached(server) as engine:
            running = asyncio.create_task(one(engine, ask(max_new_tokens=900)))
            await asyncio.sleep(0.1)
            await engine.sleep()
            assert (await running).stop_reason == "abort" and "frees nothing" in caplog.text
            await engine.sleep()  # asleep already
            with pytest.raises(EngineError, match="asleep"):
                await one(engine, ask())
            await engine.wake_up(["weights"])
            await engine.wake_up(["weights"])  # waking it twice would end the server
            assert engine.asleep == {"kv_cache", "cuda_graph"}
            await engine.wake_up()
            with pytest.raises(EngineError, match="given up in sleep"):
                await one(engine, ask())
            await push(engine, rig.model, 21)
            assert (await one(engine, ask(temperature=0.0))).token_ids == rig.greedy[:12]
            await engine.sleep(1)
            assert engine.asleep == {"kv_cache", "cuda_graph"}
            await engine.wake_up()
            assert (await one(engine, ask(temperature=0.0))).token_ids == rig.greedy[:12]
            with pytest.raises(EngineError, match="no memory is called gpu"):
                await engine.sleep(tags=["gpu"])

    asyncio.run(main())


def adapter(rig: Rig, seed: int) -> tuple[dict[str, torch.Tensor], dict]:
    chance = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, module in rig.model.named_modules():
        if name.endswith(("q_proj", "v_proj")):
            shape = module.weight.shape
            tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(4, shape[1], generator=chance)
            tensors[f"base_model.model.{name}.lora_B.weight"] = 0.05 * torch.randn(shape[0], 4, generator=chance)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "bias": "none",
              "task_type": "CAUSAL_LM", "base_model_name_or_path": str(rig.folder)}  # fmt: skip
    return tensors, config


def merged(rig: Rig, tensors: dict[str, torch.Tensor]) -> Rig:
    model = copy.deepcopy(rig.model)
    with torch.no_grad():
        for name, module in model.named_modules():
            key = f"base_model.model.{name}.lora_%s.weight"
            if key % "A" in tensors:
                module.weight += 2.0 * tensors[key % "B"] @ tensors[key % "A"]
    return Rig(folder=rig.folder, model=model, tokenizer=rig.tokenizer, greedy=[], joined="")


def test_adapters_from_a_folder_and_from_tensors(server: SGLangServer, rig: Rig, tmp_path: Path) -> None:
    first, config = adapter(rig, 1)
    second, _ = adapter(rig, 2)
    save_file(first, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))

    async def main() -> None:
        async with attached(server) as engine:
            await engine.load_lora_adapter("mine-1", str(tmp_path))
            payloads, alive = adapter_payloads(second, 1)
            await engine.load_lora_tensors("mine-2", payloads, config)
            del alive
            with pytest.raises(EngineError, match="mine-1"):
                await engine.load_lora_adapter("mine-1", str(tmp_path))
            for name, expected in (("mine-1", merged(rig, first)), ("mine-2", merged(rig, second)), (None, rig)):
                engine.use_adapter(name)
                answer = await one(engine, ask())
                assert expected.gap(PROMPT, answer) < 1e-4
                assert (rig.gap(PROMPT, answer) < 1e-4) == (name is None)
            for name in ("mine-1", "mine-2"):
                await engine.unload_lora_adapter(name)
            with pytest.raises(EngineError, match="mine-1"):
                await one(engine, ask(extra={"lora_path": "mine-1"}))
            assert (await one(engine, ask(temperature=0.0))).token_ids == rig.greedy[:12]

    asyncio.run(main())


def test_weights_from_disk(server: SGLangServer, rig: Rig) -> None:
    async def main() -> None:
        async with attached(server) as engine:
            await engine.update_from_disk(str(rig.folder))
            await engine.commit_weights(31)
            answer = await one(engine, ask(temperature=0.0))
            assert (answer.token_ids, answer.weight_version) == (rig.greedy[:12], 31)
            with pytest.raises(EngineError, match="update_weights_from_disk"):
                await engine.update_from_disk(str(rig.folder / "nowhere"))

    asyncio.run(main())


def test_a_profile_is_written(server: SGLangServer, tmp_path: Path) -> None:
    async def main() -> None:
        async with attached(server) as engine:
            await engine.start_profile(output_dir=str(tmp_path), activities=["CPU"])
            await one(engine, ask())
            await engine.stop_profile()

    asyncio.run(main())
    assert list(tmp_path.rglob("*.json.gz"))


def test_what_only_sglang_knows(server: SGLangServer, rig: Rig) -> None:
    async def main() -> None:
        async with attached(server) as engine:
            pattern = rig.joined[0].replace("[", r"\[") + "."
            answer = await one(engine, ask(max_new_tokens=24, temperature=0.0, extra={"stop_regex": pattern}))
            assert answer.stop_reason == "stop" and answer.token_ids == rig.greedy[: len(answer.token_ids)]
            with pytest.raises(EngineError, match="regex needs a GPU"):
                await one(engine, ask(extra={"regex": "a+"}))
            with pytest.raises(EngineError, match="ignore_eos"):
                await one(engine, ask(stop_token_ids=(5,)))
            with pytest.raises(EngineError, match="repetition_penalty"):
                await one(engine, ask(repetition_penalty=3.0))  # the server's own limit
            assert (await one(engine, ask(temperature=0.0))).token_ids == rig.greedy[:12]

    asyncio.run(main())
