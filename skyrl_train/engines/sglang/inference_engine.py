"""``SGLangInferenceEngine``: an SGLang server for a script.

    engine = SGLangInferenceEngine(tokenizer=tokenizer, model_path="Qwen/Qwen3-0.6B", tp_size=1)
    answers = await engine.generate(prompts=["Hello"], sampling_params={"max_new_tokens": 16})
    await engine.sleep()                                # gives up the weights too
    await engine.wake_up()
    await engine.update_named_weights(model.state_dict())
    await engine.close()

Everything is awaitable, and belongs to one event loop.
"""

from __future__ import annotations

import asyncio
import logging
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from uuid import uuid4

from skyrl_train.config.environ import read_environment
from skyrl_train.engines.base import Completion, Request, SamplingParams
from skyrl_train.engines.sglang.attention import choose_attention
from skyrl_train.engines.sglang.control import PauseMode
from skyrl_train.engines.sglang.engine import SGLangEngine
from skyrl_train.engines.sglang.launch import SGLangServer
from skyrl_train.engines.sglang.options import (
    LORA_RANK,
    cpu_arguments,
    cpu_variables,
    local_path,
    look_around,
    with_user_arguments,
)
from skyrl_train.engines.sglang.payloads import GB, Spec, bucket_payloads, pack, plan_buckets
from skyrl_train.errors import ConfigError, EngineError, ModelError
from skyrl_train.models.loading import checkpoint_dtype

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger("skyrl.engines.sglang")

ALIASES = {
    "max_tokens": "max_new_tokens",
    "max_generate_length": "max_new_tokens",
    "min_tokens": "min_new_tokens",
    "lora_name": "lora_path",
}
"""Names that other engines give to the same parameters."""
OURS = frozenset(field.name for field in fields(SamplingParams)) - {"extra"}


class SGLangInferenceEngine:
    """Starts a server at once; the first call waits until it serves.

    Args:
        tokenizer: of the model; turns chat messages and text into token ids and back.
        model_path: folder or hub name.
        python: of an environment that has SGLang; None: this one.
        log: file for the server's output; None: a new one in the temporary folder.
        start_timeout: seconds until it must serve.
        **server_args: SGLang's own arguments, such as ``tp_size`` or ``mem_fraction_static``.

    Raises:
        ConfigError: no tokenizer; an attention backend that cannot run here.
        MissingPackageError: SGLang is not installed.
    """

    def __init__(
        self,
        tokenizer: Any = None,
        model_path: str = "",
        *,
        python: str | None = None,
        log: Path | str | None = None,
        start_timeout: float = 1800.0,
        **server_args: Any,
    ) -> None:
        if tokenizer is None:
            raise ConfigError(
                "tokenizer", None, "tokenizer is required for SGLangInferenceEngine.",
                "Pass the model's: AutoTokenizer.from_pretrained(model_path).",
            )  # fmt: skip
        if not model_path:
            raise ConfigError("model_path", model_path, "names no model.", "Pass a folder, or a name on the hub.")
        self.tokenizer = tokenizer
        around = look_around(python, gpu=server_args.get("device") != "cpu")
        log_file = Path(log) if log else Path(tempfile.mkdtemp(prefix="skyrl-sglang-")) / "engine.log"
        arguments: dict[str, Any] = {
            "model_path": local_path(model_path),
            "dtype": _dtype(model_path, on_gpu=around.capability is not None),
            "skip_server_warmup": True,
            "incremental_streaming_output": True,
            "log_level": read_environment().sglang_log_level,
            "attention_backend": choose_attention(around.capability, around.installed),
        }
        if around.capability is None:
            arguments |= cpu_arguments()
        else:
            arguments["enable_memory_saver"] = True  # else sleep frees nothing
        if server_args.get("enable_lora"):
            arguments |= {"max_lora_rank": LORA_RANK, "lora_target_modules": ["all"]}
        self.server = SGLangServer(
            with_user_arguments(arguments, server_args, around.capability),
            log=log_file,
            python=python,
            env=cpu_variables(None, int(server_args.get("tp_size", 1))) if around.capability is None else None,
            start_timeout=start_timeout,
        )
        self.server.start()
        self._engine: SGLangEngine | None = None
        self._attaching = asyncio.Lock()
        self._updates = 0
        self._asked: asyncio.Task[None] | None = None
        """The call that was made last of those that are made at once."""

    async def engine(self) -> SGLangEngine:
        """The engine itself, once the server serves."""
        async with self._attaching:
            if self._engine is None:
                self._engine = await self.server.attach()
            return self._engine

    async def generate(
        self,
        batch: Mapping[str, Any] | None = None,
        *,
        prompts: Sequence[Any] | None = None,
        prompt_token_ids: Sequence[Sequence[int]] | None = None,
        sampling_params: Mapping[str, Any] | None = None,
        session_ids: Sequence[Any] | None = None,
    ) -> dict[str, list[Any]]:
        """Samples for every prompt, all at once.

        Args:
            batch: the other arguments in one mapping.
            prompts: texts, or lists of chat messages.
            prompt_token_ids: in place of ``prompts``.
            sampling_params: as in ``generator.sampling_params``, or SGLang's own names.
            session_ids: conversations that the prompts belong to.

        Returns:
            By prompt, its ``n`` samples in turn: ``responses``, ``response_ids``, ``stop_reasons``,
            ``response_logprobs`` and ``weight_versions``.

        Raises:
            EngineError: see ``SGLangEngine.generate``.
        """
        given = dict(batch or {})
        prompts = given.get("prompts") if prompts is None else prompts
        ids = given.get("prompt_token_ids") if prompt_token_ids is None else prompt_token_ids
        if (prompts is None) == (ids is None):
            raise ConfigError("prompts", prompts, "give either prompts or prompt_token_ids.")
        rows = [self._ids(prompt) for prompt in prompts or ()] if ids is None else [list(row) for row in ids]
        params = sampling_from(given.get("sampling_params") if sampling_params is None else sampling_params)
        sessions = given.get("session_ids") if session_ids is None else session_ids
        engine, name = await self.engine(), uuid4().hex
        requests = [
            Request(id=f"{name}/{i}", prompt_ids=row, params=params, session=str(sessions[i]) if sessions else None)
            for i, row in enumerate(rows)
        ]
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(engine.generate(request)) for request in requests]
        return self._output([completion for task in tasks for completion in task.result()])

    async def update_named_weights(
        self, weights: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]], *, version: int | None = None
    ) -> None:
        """Replaces the weights of the server, which must be on this machine.

        Args:
            weights: under the names of a Hugging Face checkpoint, whole; on the CPU or on a GPU that the server uses.
            version: what the server reports from now on; None counts on.

        Raises:
            EngineError: requests run; or the server refused a bucket: its weights are then partly new.
        """
        engine = await self.engine()
        if not weights:
            raise ConfigError("weights", weights, "is empty.")
        if engine.in_flight and not engine.paused:
            raise EngineError(
                f"{engine.url}: weights cannot change under {engine.in_flight} requests that run. Await them, or call "
                "pause_generation() before, and continue_generation() after."
            )
        named = dict(weights)
        facts = engine.facts
        specs = [Spec(name=name, shape=tuple(t.shape), dtype=t.dtype) for name, t in named.items()]
        await engine.begin_update()
        for bucket in plan_buckets(specs, GB):
            tensors = [named[spec.name] for spec in bucket]
            flat, _ = pack(bucket, tensors, tensors[0].device)
            payloads, alive = bucket_payloads(bucket, flat, facts.tensor_parallel, facts.pipeline_parallel)
            await engine.update_from_tensors(payloads)
            del alive
        await engine.end_update()
        self._updates = self._updates + 1 if version is None else version
        await engine.wake_up()  # the weights are there: nothing else needs to sleep
        await engine.commit_weights(self._updates)

    async def sleep(self, level: Literal[1, 2] = 2, *, tags: Iterable[str] | None = None) -> None:
        """Releases memory; by default everything, weights included."""
        await (await self.engine()).sleep(level, tags=tags)

    async def wake_up(self, tags: Iterable[str] | None = None) -> None:
        """Takes the memory again. Weights that were given up must then be sent by ``update_named_weights``."""
        await (await self.engine()).wake_up(tags)

    async def pause_generation(self, mode: PauseMode = "abort") -> None:
        await (await self.engine()).pause(mode)

    async def continue_generation(self) -> None:
        await (await self.engine()).resume()

    async def abort_generation(self) -> None:
        """Ends what runs; each call returns what it had."""
        await (await self.engine()).abort()

    async def reset_prefix_cache(self) -> None:
        await (await self.engine()).flush()

    async def load_lora_adapter(self, lora_name: str, lora_path: str, *, pinned: bool = False) -> None:
        """Loads a PEFT folder. ``sampling_params={"lora_path": lora_name}`` samples with it."""
        await (await self.engine()).load_lora_adapter(lora_name, lora_path, pinned=pinned)

    async def unload_lora_adapter(self, lora_name: str) -> None:
        await (await self.engine()).unload_lora_adapter(lora_name)

    def start_profile(self, **options: Any) -> asyncio.Task[None]:
        """See ``SGLangEngine.start_profile``. It is asked at once, also where nobody awaits the answer."""
        return self._at_once("start_profile", **options)

    def stop_profile(self) -> asyncio.Task[None]:
        """Writes the trace. It is asked at once, also where nobody awaits the answer."""
        return self._at_once("stop_profile")

    def _at_once(self, call: str, **options: Any) -> asyncio.Task[None]:
        """One after the other, in the order in which they were asked; an error that nobody awaits is logged."""

        async def ask(before: asyncio.Task[None] | None) -> None:
            if before is not None:
                await asyncio.wait([before])
            await getattr(await self.engine(), call)(**options)

        self._asked = asyncio.get_running_loop().create_task(ask(self._asked))
        self._asked.add_done_callback(partial(_tell_failure, call))
        return self._asked

    async def close(self) -> None:
        """Ends the server."""
        if self._asked is not None:
            await asyncio.wait([self._asked])
        if self._engine is not None:
            engine, self._engine = self._engine, None
            await engine.close()
        await self.server.close()

    async def __aenter__(self) -> SGLangInferenceEngine:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def _ids(self, prompt: Any) -> list[int]:
        if isinstance(prompt, str):
            return list(self.tokenizer.encode(prompt, add_special_tokens=False))
        text = self.tokenizer.apply_chat_template(list(prompt), add_generation_prompt=True, tokenize=False)
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def _output(self, completions: Sequence[Completion]) -> dict[str, list[Any]]:
        text = partial(self.tokenizer.decode, skip_special_tokens=True)
        return {
            "responses": [text(c.token_ids) for c in completions],
            "response_ids": [c.token_ids for c in completions],
            "stop_reasons": [c.stop_reason for c in completions],
            "response_logprobs": [c.logprobs for c in completions],
            "weight_versions": [c.weight_version for c in completions],
        }


def _dtype(model_path: str, *, on_gpu: bool) -> str:
    """SGLang's "auto" makes float16 of float32."""
    try:
        stored = checkpoint_dtype(model_path)
    except ModelError:  # the server may know better
        return "auto"
    return "auto" if stored != "float32" else "bfloat16" if on_gpu else "float32"


def _tell_failure(call: str, task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("%s: %s", call, error)


def sampling_from(given: Mapping[str, Any] | None) -> SamplingParams:
    """``SamplingParams`` of a plain mapping, whose names may be ours, SGLang's or vLLM's.

    Raises:
        EngineError: a value of the wrong kind.
    """
    values: dict[str, Any] = {"max_new_tokens": 128}
    extra: dict[str, Any] = {}
    for name, value in (given or {}).items():
        name = ALIASES.get(name, name)
        if value is None or name in ("logprobs", "no_stop_trim", "include_stop_str_in_output"):
            continue  # log-probs always come, and stop strings are always kept
        if name in ("stop", "stop_token_ids"):
            value = (value,) if isinstance(value, str | int) else tuple(value)
        (values if name in OURS else extra)[name] = value
    try:
        return SamplingParams(**values, extra=extra)
    except (TypeError, ValueError) as error:
        raise EngineError(f"sampling_params: {error}") from error
