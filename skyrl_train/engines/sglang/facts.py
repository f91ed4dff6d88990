"""What an SGLang server is and can do, asked of the server itself when we attach. A version number decides only where
nothing can be asked.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from skyrl_train.engines.base import Capabilities, SamplingParams
from skyrl_train.engines.faults import EngineRefusedError
from skyrl_train.engines.http import ServerClient
from skyrl_train.errors import EngineError, EngineTimeoutError

log = logging.getLogger("skyrl.engines.sglang")

TESTED = {"0.5.17": "in full", "0.5.21": "through the contract tests"}
PROBED = (
    "/begin_weight_update",
    "/weights_checker",
    "/pause_generation",
    "/load_lora_adapter",
    "/load_lora_adapter_from_tensors",
    "/release_memory_occupation",
    "/update_weights_from_tensor",
    "/init_weights_update_group",
    "/update_weights_from_disk",
    "/update_weight_version",
    "/start_profile",
)
UNKNOWN_VERSION = -1
"""The weight version of a server whose label is no number: nobody has proven what it serves."""
PAUSED = 3.0
"""Seconds after which a server that should refuse a request at once is taken to be paused."""
_VOCABULARY = re.compile(r"\[0, (\d+)\]")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerFacts:
    """Facts of one server that do not change while it runs."""

    url: str
    version: str
    model_path: str = ""
    device: str = "cuda"
    dtype: str = "auto"
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    data_parallel: int = 1
    expert_parallel: int = 1
    attention_data_parallel: bool = False
    """The data-parallel copies share one model; otherwise each is one by itself."""
    quantization: str | None = None
    context_length: int | None = None
    """Prompt and completion together, in tokens."""
    max_input: int | None = None
    """A prompt must be shorter than this, in tokens."""
    vocabulary: int | None = None
    max_running_requests: int | None = None
    memory_saver: bool = False
    weights_backup: bool = False
    """Weights survive sleep, in host memory."""
    lora: bool = False
    deterministic: bool = False
    """Seeds are honoured."""
    incremental: bool = False
    """A stream's events hold what is new, not all so far."""
    grammar: bool = True
    """Output can be held to a schema, pattern or grammar."""
    loaders: frozenset[str] = frozenset()
    """Ways to load weights that its owner has added (``custom_weight_loader``)."""
    endpoints: frozenset[str] = frozenset()

    @property
    def replicated(self) -> bool:
        """Several whole copies of the model behind one address: SGLang refuses them weights from memory."""
        return self.data_parallel > 1 and not self.attention_data_parallel

    @property
    def update_sessions(self) -> bool:
        """Weight updates must stand between ``begin`` and ``end`` (0.5.21 and later)."""
        return "/begin_weight_update" in self.endpoints

    @property
    def flush_after_retract_is_fatal(self) -> bool:
        """0.5.10 to 0.5.20: with retracted requests in the queue a flush inside an update ends the server."""
        return (0, 5, 10) <= version_numbers(self.version) < (0, 5, 21)

    @property
    def pause_modes(self) -> frozenset[str]:
        return frozenset(("abort", "in_place", "retract") if "/pause_generation" in self.endpoints else ())

    def capabilities(self) -> Capabilities:
        names = {f.name for f in fields(SamplingParams)} - (set() if self.deterministic else {"seed"})
        return Capabilities(
            name="sglang",
            sampling=frozenset(names),
            sleep=self.memory_saver,
            lora=self.lora,
            tensor_parallel=True,
            pipeline_parallel=True,
            data_parallel=True,
            profile="/start_profile" in self.endpoints,
        )


async def probe(client: ServerClient, *, deadline: float) -> ServerFacts:
    """Asks a server that answers already.

    Raises:
        EngineError: it is no SGLang server, it serves no generation, or it does not answer.
    """
    info = await _info(client, deadline)
    endpoints = [path for path in PROBED if await client.exists(path, deadline=deadline)]
    facts = _read(client.url, info, frozenset(endpoints), await _context(client, deadline),
                  await _vocabulary(client, deadline))  # fmt: skip
    if facts.version not in TESTED:
        tested = " and ".join(f"{version} {how}" for version, how in TESTED.items())
        log.warning("%s runs SGLang %s; tested are %s. Its endpoints were probed.", client.url, facts.version, tested)
    return facts


async def _info(client: ServerClient, deadline: float) -> Mapping[str, Any]:
    for path in ("/server_info", "/get_server_info"):
        try:
            info = await client.get(path, deadline=deadline)
        except EngineRefusedError as error:
            if "HTTP 404" in str(error):
                continue
            if "HTTP 401" in str(error):
                raise EngineError(f"{error}. The server wants a key.") from error
            raise
        if isinstance(info, Mapping) and "version" in info:
            return info
    raise EngineError(f"{client.url}: no SGLang server (it has no /server_info).")


async def _context(client: ServerClient, deadline: float) -> int | None:
    try:
        models = await client.get("/v1/models", deadline=deadline)
        return int(models["data"][0]["max_model_len"])
    except (EngineRefusedError, LookupError, TypeError, ValueError):
        return None


async def _vocabulary(client: ServerClient, deadline: float) -> int | None:
    """The number of token ids, which no endpoint tells, and beyond which one id ends the server.

    Read off the refusal of a request whose ``logit_bias`` names the id -1; the request never runs.
    """
    body = {"input_ids": [0], "sampling_params": {"max_new_tokens": 0, "logit_bias": {"-1": 0.0}}}
    for wait in (min(deadline, PAUSED), deadline):
        try:
            await client.generate("/generate", body, deadline=wait)
        except EngineTimeoutError:  # a run that was killed in the middle of a weight sync leaves its engines paused
            log.warning("%s does not generate; in case it was left paused, it is told to go on", client.url)
            await client.post("/continue_generation", {}, deadline=deadline)
        except EngineError as error:
            found = _VOCABULARY.search(str(error))
            return int(found[1]) + 1 if found else None
    return None


def _read(
    url: str, info: Mapping[str, Any], endpoints: frozenset[str], context: int | None, vocabulary: int | None
) -> ServerFacts:
    device = str(info.get("device") or "cuda")
    return ServerFacts(
        url=url,
        version=str(info["version"]),
        model_path=str(info.get("model_path") or ""),
        device=device,
        dtype=str(info.get("dtype") or "auto"),
        tensor_parallel=int(info.get("tp_size") or 1),
        pipeline_parallel=int(info.get("pp_size") or 1),
        data_parallel=int(info.get("dp_size") or 1),
        expert_parallel=int(info.get("ep_size") or 1),
        attention_data_parallel=bool(info.get("enable_dp_attention")),
        quantization=info.get("quantization"),
        context_length=context or info.get("context_length"),
        max_input=info.get("max_req_input_len"),
        vocabulary=vocabulary,
        max_running_requests=info.get("max_running_requests"),
        memory_saver=bool(info.get("enable_memory_saver")),
        weights_backup=bool(info.get("enable_weights_cpu_backup")),
        lora=bool(info.get("enable_lora")),
        deterministic=bool(info.get("enable_deterministic_inference")),
        incremental=bool(info.get("incremental_streaming_output")),
        # On a CPU, xgrammar ends the scheduler with the first constrained request.
        grammar=device != "cpu" or info.get("grammar_backend") != "xgrammar",
        loaders=frozenset(info.get("custom_weight_loader") or ()),
        endpoints=endpoints,
    )


def version_numbers(version: str) -> tuple[int, ...]:
    """``0.5.10.post1`` as (0, 5, 10)."""
    return tuple(int(number) for number in re.findall(r"\d+", version.split("post")[0].split("+")[0])[:3])


def version_of(label: object) -> int:
    """A weight-version label as a number; ``UNKNOWN_VERSION`` if it is none (a fresh server says "default")."""
    text = str(label)
    return int(text) if text.isascii() and text.isdigit() else UNKNOWN_VERSION
