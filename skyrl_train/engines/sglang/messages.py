"""Our requests in SGLang's words, and its answers in ours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from skyrl_train.engines.base import Completion, Request, SamplingParams
from skyrl_train.engines.continuation import GRAMMARS
from skyrl_train.engines.embedded.checks import check_request
from skyrl_train.engines.faults import EngineLostError, EngineRefusedError
from skyrl_train.engines.sglang.facts import UNKNOWN_VERSION, ServerFacts, version_of
from skyrl_train.errors import EngineError

BESIDE = ("custom_logit_processor", "lora_path", "extra_key", "priority", "routed_dp_rank", "session_params")
"""Keys of ``SamplingParams.extra`` that SGLang takes beside its sampling parameters."""
AMONG = (*GRAMMARS, "stop_regex", "custom_params", "stream_interval", "skip_special_tokens")
"""Keys that it takes among them. Any other would be answered by a broken connection, as if the server had failed."""
UNLIMITED = 1 << 60
CLOSED = 499
"""The code of a request that the server aborted of its own accord."""
NEVER = "\ufffe"
"""A noncharacter, which no model writes and no tokenizer joins: see ``_stops``."""


def check(request: Request, facts: ServerFacts) -> None:
    """Refuses what the server would refuse, change silently, or die of.

    Raises:
        EngineRefusedError: naming the request, the parameter and the way out.
    """
    where = f"sglang engine {facts.url}"
    try:
        check_request(
            request, engine=where, vocabulary=facts.vocabulary or UNLIMITED,
            max_length=facts.context_length or UNLIMITED, can_decode=True, takes_extra=True,
        )  # fmt: skip
    except EngineError as error:
        raise EngineRefusedError(str(error)) from None
    length, used = len(request.prompt_ids), sorted(set(GRAMMARS) & {k for k, v in request.params.extra.items() if v})
    if facts.max_input is not None and length >= facts.max_input:
        raise EngineRefusedError(
            f"{where}, request {request.id!r}: a prompt of {length} tokens; the server takes fewer than "
            f"{facts.max_input}. Lower generator.max_input_length, or give the server more memory for its cache."
        )
    if request.params.ignore_eos and request.params.stop_token_ids:
        raise EngineRefusedError(
            f"{where}, request {request.id!r}: with ignore_eos SGLang ignores stop_token_ids too. Remove one of "
            "them, or use stop strings."
        )
    if unknown := sorted(set(request.params.extra) - {*BESIDE, *AMONG}):
        raise EngineRefusedError(
            f"{where}, request {request.id!r}: SGLang has no sampling parameter {unknown[0]!r}. There are "
            f"{', '.join((*AMONG, *BESIDE))}."
        )
    if used and not facts.grammar:
        raise EngineRefusedError(
            f"{where}, request {request.id!r}: {used[0]} needs a GPU: the grammar backend of this server cannot work "
            f"on a CPU. Remove generator.sampling_params.{used[0]}."
        )


def generate_body(
    request: Request,
    rid: str,
    facts: ServerFacts,
    *,
    adapter: str | None = None,
    salt: str | None = None,
    interval: int | None = None,
) -> dict[str, Any]:
    """The body of ``/generate`` for one sample.

    Args:
        request: with ``n=1``.
        rid: the name under which the server knows it.
        adapter: LoRA adapter to sample with.
        salt: only requests of the same salt share cached prefixes.
        interval: stream an event for every so many tokens; None: one answer at the end.
    """
    params, extra = request.params, dict(request.params.extra)
    beside = {key: extra.pop(key) for key in BESIDE if extra.get(key) is not None}
    if adapter is not None:
        beside.setdefault("lora_path", adapter)
    if salt is not None:
        beside.setdefault("extra_key", salt)
    sampling = sampling_body(params, seeded=facts.deterministic)
    sampling |= {key: value for key, value in extra.items() if value is not None}
    body = {
        "rid": rid,
        "input_ids": list(request.prompt_ids),
        "sampling_params": sampling,
        "return_logprob": True,
        "logprob_start_len": -1,
        **beside,
    }
    if interval is not None:
        body["stream"] = True
        sampling.setdefault("stream_interval", interval)
    return body


def sampling_body(params: SamplingParams, *, seeded: bool) -> dict[str, Any]:
    """SGLang's sampling parameters; what is off is left out."""
    body: dict[str, Any] = {"max_new_tokens": params.max_new_tokens, "temperature": params.temperature}
    for name, off in _OFF.items():
        value = getattr(params, name)
        if value not in off:
            body[name] = value
    if params.stop:
        body |= {"stop": _stops(params.stop), "no_stop_trim": True}
    if params.stop_token_ids:
        body["stop_token_ids"] = list(params.stop_token_ids)
    if params.logit_bias:
        body["logit_bias"] = {str(token): bias for token, bias in params.logit_bias.items()}
    if seeded and params.seed is not None:
        body["sampling_seed"] = params.seed & 0x7FFFFFFF
    return body


_OFF: dict[str, tuple[Any, ...]] = {
    "min_new_tokens": (0,),
    "top_p": (1.0,),
    "top_k": (-1, 0),
    "min_p": (0.0,),
    "repetition_penalty": (1.0,),
    "frequency_penalty": (0.0,),
    "presence_penalty": (0.0,),
    "ignore_eos": (False,),
}


def _stops(stops: tuple[str, ...]) -> list[str]:
    """The stop strings, and one that never comes.

    SGLang looks for them in the last tokens only, as many as the longest of them has when tokenized by itself. A policy
    may spell a string in more tokens than that. One noncharacter for each byte makes the window wide enough.
    """
    return [*stops, NEVER * max(len(stop.encode()) for stop in stops)]


@dataclass(slots=True)
class Answer:
    """One sample as it grows out of the server's events, or out of its only answer."""

    url: str
    asked_at: int | None = None
    """The version committed when the request was sent: what is sampled may be that old."""
    incremental: bool = True
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    reason: Mapping[str, Any] | None = None

    def take(self, event: Mapping[str, Any]) -> None:
        """Adds an event.

        Raises:
            EngineRefusedError, EngineLostError: the event says that the server gave up.
            EngineError: tokens and log-probs that do not belong together.
        """
        if "meta_info" not in event:
            self._fail(event.get("error", event))
        meta = event["meta_info"]
        ids, scored = event["output_ids"], meta.get("output_token_logprobs") or []
        if [entry[1] for entry in scored] != list(ids):
            raise EngineError(f"{self.url}/generate: {len(ids)} tokens came with log-probs of {len(scored)} others.")
        if any(entry[0] is None for entry in scored):
            raise EngineError(
                f"{self.url}/generate: the log-prob of a sampled token is no number. The policy's weights or logits "
                "are not finite: it has diverged, or generator.model_dtype is too narrow for it."
            )
        if not self.incremental:
            self.token_ids, self.logprobs = [], []
        self.token_ids += ids
        self.logprobs += [float(entry[0]) for entry in scored]
        self.reason = meta.get("finish_reason")
        spans = meta.get("weight_versions")  # which version sampled which tokens: SGLang 0.5.19 and later
        labels = [span["version"] for span in spans] if spans else [meta.get("weight_version")]
        since = [] if spans or self.asked_at is None else [self.asked_at]
        self.versions = [*map(version_of, labels), *since]
        if self.reason is not None and self.reason.get("type") == "abort" and self.reason.get("status_code"):
            status, text = self.reason["status_code"], self.reason.get("message")
            message = f"{self.url}/generate: HTTP {status}: {text}"
            raise EngineRefusedError(message) if status < 500 else EngineLostError(message, self.completion())

    def _fail(self, error: Any) -> NoReturn:
        """The server gave up. One that is being ended aborts what runs, and says so with a code of its own (499)."""
        known = error if isinstance(error, Mapping) else {}
        message = f"{self.url}/generate: {known.get('message', error)}"
        code = known.get("code")
        if isinstance(code, int) and (code == CLOSED or code >= 500):
            raise EngineLostError(f"{message} (code {code})", self.completion())
        raise EngineRefusedError(message)

    def completion(self) -> Completion:
        """What was sampled so far; an unfinished one counts as aborted."""
        reason = self.reason or {"type": "abort"}
        return Completion(
            token_ids=list(self.token_ids),
            logprobs=list(self.logprobs),
            stop_reason=reason["type"] if reason["type"] in ("stop", "length") else "abort",
            matched=reason.get("matched"),
            weight_version=min(self.versions, default=UNKNOWN_VERSION if self.asked_at is None else self.asked_at),
        )
