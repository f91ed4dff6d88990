"""The engine of a script, through the calls of the FAQ, on a server that it starts itself."""

from __future__ import annotations

import asyncio
import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from sglang_cpu.servers import begun

import skyrl_train
from engines.contract import PROMPT, Rig, ask, plain_greedy
from skyrl_train import SGLangInferenceEngine
from skyrl_train.engines.embedded.engine import EmbeddedEngine
from skyrl_train.engines.pool import EnginePool
from skyrl_train.engines.sglang.inference_engine import sampling_from
from skyrl_train.errors import ConfigError, EngineError

CHAT = [{"role": "user", "content": "2+2"}]


def test_no_tokenizer_no_model() -> None:
    with pytest.raises(ValueError, match="tokenizer is required for SGLangInferenceEngine"):
        SGLangInferenceEngine(model_path="x")
    with pytest.raises(ConfigError, match="names no model"):
        SGLangInferenceEngine(tokenizer=object())
    with pytest.raises(AttributeError, match="no attribute 'Nonesuch'"):
        _ = skyrl_train.Nonesuch


def test_sampling_parameters_by_any_of_their_names() -> None:
    params = sampling_from(
        {"max_tokens": 5, "stop": "x", "stop_token_ids": [1], "logprobs": 0, "stop_regex": "a+", "top_p": None, "n": 2}
    )
    assert (params.max_new_tokens, params.stop, params.stop_token_ids, params.n) == (5, ("x",), (1,), 2)
    assert params.extra == {"stop_regex": "a+"} and params.top_p == 1.0
    assert sampling_from(None).max_new_tokens == 128


@pytest.mark.timeout(300)
def test_the_calls_of_the_faq_and_the_death_of_the_server(sglang_python: str, rig: Rig, tmp_path: Path) -> None:
    """One server for both, because starting one is what takes long."""
    log = tmp_path / "logs" / "engine-0.log"

    async def main() -> None:
        engine = SGLangInferenceEngine(
            tokenizer=rig.tokenizer, model_path=str(rig.folder), python=sglang_python, log=log,
            device="cpu", max_total_tokens=8192, max_running_requests=8,
        )  # fmt: skip
        async with engine:
            await the_calls(engine, rig, tmp_path)
            await death(engine, rig)
        assert engine.server.process is None

    asyncio.run(main())
    assert "skip_server_warmup=True" in log.read_text(errors="replace")


async def the_calls(engine: SGLangInferenceEngine, rig: Rig, folder: Path) -> None:
    greedy: dict[str, Any] = {"max_new_tokens": 12, "temperature": 0, "ignore_eos": True}
    by_ids, by_text = await asyncio.gather(
        engine.generate(prompt_token_ids=[PROMPT, [9, 9]], sampling_params=greedy, session_ids=["a", "b"]),
        engine.generate({"prompts": [rig.text(PROMPT), CHAT], "sampling_params": greedy}),
    )
    assert by_ids["response_ids"][0] == by_text["response_ids"][0] == rig.greedy[:12]
    assert by_ids["responses"][0] == rig.tokenizer.decode(rig.greedy[:12], skip_special_tokens=True)
    assert by_ids["stop_reasons"] == ["length", "length"] and len(by_ids["response_logprobs"][1]) == 12
    with pytest.raises(ConfigError, match="either prompts or prompt_token_ids"):
        await engine.generate()

    other = copy.deepcopy(rig.model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    await engine.sleep()
    await engine.wake_up()
    with pytest.raises(EngineError, match="Send and commit weights first"):
        await (await engine.engine()).generate(ask())
    for version, model in ((1, other), (2, rig.model)):
        await engine.update_named_weights(model.state_dict())
        answer = await engine.generate(prompt_token_ids=[PROMPT], sampling_params=greedy)
        assert answer["response_ids"][0] == plain_greedy(model, PROMPT, 12)
        assert answer["weight_versions"] == [version]

    profiled = folder / "profile"
    engine.start_profile(output_dir=str(profiled), activities=["CPU"])  # nobody has to await it
    await engine.generate(prompt_token_ids=[PROMPT], sampling_params=greedy)
    await engine.stop_profile()
    assert list(profiled.rglob("*.json.gz"))
    running = asyncio.create_task(engine.generate(prompt_token_ids=[PROMPT], sampling_params={"max_new_tokens": 900}))
    await begun(await engine.engine())
    with pytest.raises(EngineError, match="under 1 requests that run"):
        await engine.update_named_weights(rig.model.state_dict())
    await engine.abort_generation()
    assert len((await running)["response_ids"][0]) < 900
    with pytest.raises(ConfigError, match="without LoRA"):
        await engine.load_lora_adapter(lora_name="my_adapter", lora_path="/path/to/lora")


async def death(engine: SGLangInferenceEngine, rig: Rig) -> None:
    """Killed in the middle: what had been streamed is known, and another engine carries it on."""
    inner = await engine.engine()
    task = asyncio.create_task(inner.generate(ask(max_new_tokens=900)))
    await begun(inner)
    assert engine.server.process is not None and engine.server.process._process is not None
    engine.server.process._process.kill()
    with pytest.raises(EngineError) as raised:
        await task
    partial = getattr(raised.value, "partial", None)
    assert partial is not None and 0 < len(partial.token_ids) < 900
    assert rig.gap(PROMPT, partial) < 1e-4
    pool = EnginePool({"dead": inner, "lives": EmbeddedEngine(rig.model, tokenizer=rig.tokenizer, deterministic=False)})
    (answer,) = await pool.generate(ask(temperature=0.0))
    assert answer.token_ids == rig.greedy[:12] and "cannot connect" in pool.quarantined()["dead"]
