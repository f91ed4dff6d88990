"""Proof that an engine samples from the policy: the digests of its memory, and the log-probs of a fixed probe.

The digests catch what is small: one tensor of one rank, off by one unit in the last place. The probe catches what
digests cannot see: a prefix cache of the old policy, an adapter that is not applied, another number format. It asks
for the log-probs of each row's last quarter, so that the rest comes out of the cache if anything is there.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Awaitable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice
from typing import Any
from weakref import WeakKeyDictionary

from skyrl_train.engines.sglang.engine import SGLangEngine
from skyrl_train.engines.sglang.facts import TESTED, ServerFacts
from skyrl_train.errors import WeightSyncError
from skyrl_train.weight_sync.digests import Kind
from skyrl_train.weight_sync.layout import Rank
from skyrl_train.weight_sync.outline import Sent

log = logging.getLogger("skyrl.weight_sync")

NAMED = 5
"""Tensors that an error names."""
TOLERANCE = {"float32": 1e-3}
"""Mean difference of a row's log-probs, in nats, by number format."""
TOLERANCE_ELSE = 0.1
LORA_BASE = ".base_layer."
BELIEVED = 50
"""Times that our loader's word is taken for what SGLang's weights checker would say, once the two have agreed."""


class ProofFailed(WeightSyncError):
    """An engine does not hold, or does not use, the weights that were sent."""


@dataclass(frozen=True, slots=True)
class Held:
    """What one rank of an engine says that it holds."""

    rank: Rank
    digests: Mapping[str, str]


def ranks_of(facts: ServerFacts) -> list[Rank]:
    """The ranks whose digests are to be predicted: pipeline stages hold parts of what these do."""
    return [
        Rank(
            tensor_rank=rank,
            tensor_size=facts.tensor_parallel,
            expert_size=facts.expert_parallel,
            on_cpu=facts.device == "cpu",
        )
        for rank in range(facts.tensor_parallel)
    ]


def digest_kind(facts: ServerFacts) -> Kind:
    """How this server computes its digests."""
    return "sha256" if facts.device == "cpu" else "tiles"


def predictable(facts: ServerFacts) -> bool:
    """Whether what the server holds follows from what it is sent."""
    return facts.quantization is None and not facts.attention_data_parallel and "/weights_checker" in facts.endpoints


def held_by(facts: ServerFacts, answer: Mapping[str, Any]) -> list[Held]:
    """The checker's answer, rank by rank, adapters aside."""
    held = []
    for info in answer.get("ranks") or ():
        where = info["parallelism_info"]
        if isinstance(where, list):  # 0.5.21 and later: one for the model, and one for each draft model
            where = where[0]
        rank = Rank(
            tensor_rank=int(where["tp_rank"]),
            tensor_size=facts.tensor_parallel,
            expert_size=facts.expert_parallel,
            on_cpu=facts.device == "cpu",
        )
        names = {name.replace(LORA_BASE, "."): text for name, text in info["checksums"].items()}
        held.append(Held(rank, {name: text for name, text in names.items() if ".lora_" not in name}))
    return held


def differences(held: Sequence[Held], sent: Mapping[Rank, Mapping[str, str]], *, whole: bool = True) -> list[str]:
    """Tensors whose digests are not those of what was sent, each with its rank; and what no rank holds.

    Args:
        whole: every rank has answered, so what was sent must be somewhere.
    """
    wrong, seen = [], set()
    for part in held:
        expected = sent[part.rank]
        for name, found in part.digests.items():
            seen.add(name)
            wanted = expected.get(name) or (_tied(expected) if name == "lm_head.weight" else None)
            if wanted != found:
                why = "was not sent" if wanted is None else f"{found} is not {wanted}"
                wrong.append(f"{name} on rank {part.rank.tensor_rank} ({why})")
    missing = {name for digests in sent.values() for name in digests} - seen if whole else ()
    return wrong + [f"{name} is on no rank" for name in sorted(missing)]


def _digest_of(held: Sequence[Held]) -> str:
    each = sorted((part.rank.tensor_rank, *pair) for part in held for pair in part.digests.items())
    return hashlib.sha256(repr(each).encode()).hexdigest()


def _tied(expected: Mapping[str, str]) -> str | None:
    """The last pipeline stage holds a copy of tied embeddings."""
    return expected.get("model.embed_tokens.weight")


@dataclass(slots=True)
class DigestProof:
    """Compares engines with what was sent, and says once where that is not possible."""

    told: set[str] = field(default_factory=set)
    taken: WeakKeyDictionary[SGLangEngine, int] = field(default_factory=WeakKeyDictionary)
    """How often our loader's word was taken since it last agreed with SGLang's."""

    def due(self, engine: SGLangEngine) -> bool:
        """Whether SGLang itself is to be asked this time."""
        return self.taken.get(engine, BELIEVED) >= BELIEVED

    async def check(self, engine: SGLangEngine, sending: Awaitable[Sent]) -> str | None:
        """One engine. SGLang's weights checker is asked, or our loader has told where that has been right before.

        Args:
            sending: what was sent, and told; it is awaited while SGLang is asked.

        Returns:
            A digest of all it holds, for comparing replicas; None if it cannot tell.

        Raises:
            ProofFailed: names the tensors that differ.
        """
        facts = engine.facts
        if "/weights_checker" not in facts.endpoints:
            self._tell(
                f"{facts.url}: SGLang {facts.version} has no weights checker; the probe alone proves its weights."
            )
            return None
        held, checksum, sent = await self._held(engine, sending)
        if not sent or not held or any(part.rank not in sent for part in held):
            self._tell(
                f"{facts.url}: how SGLang lays out this model is not known; its digests are compared with those of its "
                "replicas only, and the probe proves the weights."
            )
            return checksum
        if facts.pipeline_parallel > 1:
            self._tell(
                f"{facts.url}: of {facts.pipeline_parallel} pipeline stages, SGLang tells the digests of the first; "
                "the probe proves the others."
            )
        if wrong := differences(held, sent, whole=facts.pipeline_parallel == 1):
            compared = sum(len(part.digests) for part in held)
            if len(wrong) >= compared and facts.version not in TESTED:
                self._tell(
                    f"{facts.url}: none of {compared} digests is the expected one, so SGLang {facts.version} computes "
                    "them in another way; they are compared with its replicas' only, and the probe proves the weights."
                )
                return checksum
            shown = "; ".join(wrong[:NAMED]) + (f"; and {len(wrong) - NAMED} more" if len(wrong) > NAMED else "")
            self.taken.pop(engine, None)
            raise ProofFailed(f"{facts.url}: {len(wrong)} of {compared} tensors are not what was sent: {shown}")
        return _digest_of(held)

    async def _held(
        self, engine: SGLangEngine, sending: Awaitable[Sent]
    ) -> tuple[list[Held], str | None, Mapping[Rank, Mapping[str, str]]]:
        """What the engine's ranks hold, SGLang's digest of all that where it was asked, and what they were sent."""
        answer = None
        if self.due(engine):
            answer = await engine.weights_checksum()
        sent = await asyncio.shield(sending)
        report = [Held(rank, digests) for rank, digests in sent.reports.get(engine.url, {}).items()]
        if answer is None and report:
            self.taken[engine] += 1
            return report, None, sent.digests
        answer = answer or await engine.weights_checksum()
        held = held_by(engine.facts, answer)
        if report and _digest_of(report) == _digest_of(held):
            self.taken[engine] = 0
        else:
            self.taken.pop(engine, None)
        return held, str(answer.get("per_engine_checksum")), sent.digests

    def _tell(self, text: str) -> None:
        if text not in self.told:
            self.told.add(text)
            log.warning(text)


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """Fixed rows of token ids, and how far an engine's log-probs of them may be off."""

    rows: tuple[tuple[int, ...], ...]
    tolerance: float

    @staticmethod
    def start(row: Sequence[int]) -> int:
        """Where the part begins whose log-probs are compared."""
        return max(1, len(row) * 3 // 4)

    async def ask(self, engine: SGLangEngine, *, adapter: str | None, salt: str | None) -> list[list[float]]:
        """The engine's log-probs of each row's last quarter."""
        starts = [self.start(row) for row in self.rows]
        return await engine.prompt_logprobs(self.rows, starts, adapter=adapter, salt=salt)

    def compare(self, url: str, found: Sequence[Sequence[float]], expected: Sequence[Sequence[float]]) -> float:
        """Compares what one engine answered with the learner's log-probs of each row's last quarter.

        Returns:
            The largest of the rows' mean differences, in nats.

        Raises:
            ProofFailed: it is above the tolerance.
        """
        worst = 0.0
        for mine, wanted in zip(found, expected, strict=True):
            gap = sum(abs(a - b) for a, b in zip(mine, wanted, strict=True)) / len(wanted)
            worst = gap if not gap <= worst else worst  # nan too
        if not worst <= self.tolerance:
            raise ProofFailed(
                f"{url}: the log-probs of the probe differ from the learner's by {worst:.4g} nats a token "
                f"(generator.weight_probe_tolerance={self.tolerance:g}). Likely causes: a prefix cache that was not "
                "flushed, an adapter that is not applied, another number format (generator.model_dtype), another "
                "rotary scaling, weights that did not arrive."
            )
        return worst


def tolerance_for(wanted: float | None, engine_dtype: str, learner_dtype: str) -> float:
    """``generator.weight_probe_tolerance``, or what the two number formats allow."""
    if wanted is not None:
        return wanted
    return TOLERANCE["float32"] if engine_dtype == learner_dtype == "float32" else TOLERANCE_ELSE


def make_rows(prompts: Iterable[Sequence[int]], *, length: int, count: int = 4) -> tuple[tuple[int, ...], ...]:
    """Probe rows from the data set's first prompts: short ones are repeated, long ones cut."""
    usable = islice((ids for ids in prompts if ids), count)
    return tuple(tuple(islice(cycle(ids), length)) for ids in usable)
