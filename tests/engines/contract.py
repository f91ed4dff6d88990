"""What every engine must do, as checks of one engine each: the embedded one and SGLang go through the same script.

A check is an async function of an engine and the rig; ``CHECKS`` lists them. The rig holds the model, so that every
claim about an engine's tokens is compared with the learner's own scoring.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import torch
import yaml

from skyrl_train.batch import TrainBatch, collate
from skyrl_train.engines.base import Completion, Engine, Request, SamplingParams
from skyrl_train.errors import EngineError
from skyrl_train.models.folders import save_pretrained
from skyrl_train.models.sampled import SampledDistribution
from skyrl_train.models.scoring import score, score_both
from skyrl_train.models.tiny import make_model
from skyrl_train.models.tokenizers import make_tokenizer
from skyrl_train.types import Prompt, Trajectory

SIZES = {
    "model_type": "qwen3",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 128,
    "max_position_embeddings": 1024,
    "initializer_range": 0.25,  # wide enough that attention decides the next token
    "tie_word_embeddings": False,
    "vocab_size": 128,
}
LONGEST = 1024
PROMPT = [5, 6, 7, 8]
TOLERANCE = 1e-4


@dataclass(frozen=True, kw_only=True)
class Rig:
    """The model behind the engines."""

    folder: Path
    model: Any
    tokenizer: Any
    greedy: list[int]
    """The greedy answer to ``PROMPT``."""
    joined: str
    """Text that the greedy answer spells in several tokens, and that the tokenizer writes as one."""

    def gap(self, prompt: Sequence[int], completion: Completion, temperature: float = 1.0) -> float:
        """Largest difference between a completion's log-probs and those of the learner's scoring."""
        batch = self.batch(prompt, completion)
        with torch.no_grad():
            scored, _ = score(self.model, batch, temperature=temperature, packed=True, with_entropy=False)
        return float((scored - batch.rollout_logprobs).abs().max())

    def batch(self, prompt: Sequence[int], completion: Completion) -> TrainBatch:
        row = Trajectory(prompt=Prompt(uid="a/0", messages=(), env_class="none"), sample=0, prompt_ids=list(prompt))
        row.append_sampled(completion.token_ids, completion.logprobs, completion.stop_reason, 0)
        return collate([row], pad_token_id=0)

    def text(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=False)


def make_rig(folder: Path) -> Rig:
    """Makes the model and saves it."""
    from tokenizers import AddedToken

    folder.parent.mkdir(parents=True, exist_ok=True)
    sizes = folder.with_suffix(".yaml")
    sizes.write_text(yaml.safe_dump(SIZES))
    tokenizer = make_tokenizer()
    torch.manual_seed(11)
    model = make_model(sizes, tokenizer, LONGEST).eval()
    greedy = plain_greedy(model, PROMPT, 24)
    start = next(
        i
        for i in range(4, 20)
        if all(0 < token < 98 for token in greedy[i : i + 3])
        and tokenizer.decode(greedy[i : i + 3]) not in tokenizer.decode(greedy[: i + 2])
    )
    joined = tokenizer.decode(greedy[start : start + 3])
    tokenizer.add_tokens([AddedToken(joined, normalized=False)])
    assert len(tokenizer.encode(joined, add_special_tokens=False)) == 1 and len(tokenizer) <= 128
    save_pretrained(model, tokenizer, folder)
    return Rig(folder=folder, model=model, tokenizer=tokenizer, greedy=greedy, joined=joined)


def plain_greedy(model: Any, prompt: Sequence[int], count: int) -> list[int]:
    """The likeliest continuation, by one whole forward pass a token."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def ask(prompt: Sequence[int] = PROMPT, *, session: str | None = None, **params: Any) -> Request:
    params = {"max_new_tokens": 12, "ignore_eos": True} | params
    return Request(id=f"t/{uuid4().hex[:8]}", prompt_ids=prompt, params=SamplingParams(**params), session=session)


async def one(engine: Engine, request: Request) -> Completion:
    (completion,) = await engine.generate(request)
    return completion


async def log_probs_are_the_learners(engine: Engine, rig: Rig) -> None:
    for temperature in (1.0, 0.6, 0.0):
        for prompt in ([9], PROMPT, list(range(3, 60))):
            answer = await one(engine, ask(prompt, temperature=temperature))
            assert len(answer.token_ids) == len(answer.logprobs) == 12 and answer.stop_reason == "length"
            assert rig.gap(prompt, answer, temperature) < TOLERANCE


async def greedy_is_the_models_own(engine: Engine, rig: Rig) -> None:
    answer = await one(engine, ask(max_new_tokens=24, temperature=0.0))
    assert answer.token_ids == rig.greedy


async def truncated_sampling_keeps_the_whole_distributions_log_probs(engine: Engine, rig: Rig) -> None:
    for params in ({"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.2}):
        answer = await one(engine, ask(**params))
        assert rig.gap(PROMPT, answer) < TOLERANCE
    assert (await one(engine, ask(top_k=1))).token_ids == rig.greedy[:12]


async def the_learner_knows_what_a_biased_log_prob_is_of(engine: Engine, rig: Rig) -> None:
    served = engine.capabilities.name == "sglang"
    change = SampledDistribution(logit_bias=((7, 2.0), (9, -1.0)), top_k=40, joint=served, bias_reported=served)
    answer = await one(engine, ask(temperature=0.7, top_k=40, logit_bias=dict(change.logit_bias)))
    with torch.no_grad():
        batch = rig.batch(PROMPT, answer)
        _, reported = score_both(rig.model, batch, temperature=0.7, packed=True, sampled=change)
    assert (reported - batch.rollout_logprobs).abs().max() < TOLERANCE


async def a_stop_string_is_found_in_whatever_tokens_and_kept(engine: Engine, rig: Rig) -> None:
    answer = await one(engine, ask(max_new_tokens=24, temperature=0.0, stop=("never this", rig.joined)))
    assert (answer.stop_reason, answer.matched) == ("stop", rig.joined)
    assert answer.token_ids == rig.greedy[: len(answer.token_ids)]
    assert rig.text(answer.token_ids).endswith(rig.joined)
    assert rig.joined not in rig.text(answer.token_ids[:-1])
    assert rig.gap(PROMPT, answer, 0.0) < TOLERANCE


async def a_stop_string_that_ends_inside_a_token_keeps_the_token(engine: Engine, rig: Rig) -> None:
    word = rig.tokenizer.convert_tokens_to_ids("assistant")
    answer = await one(engine, ask(temperature=0.0, logit_bias={word: 1000.0}, stop=("assis",)))
    assert answer.token_ids == [word] and (answer.stop_reason, answer.matched) == ("stop", "assis")


async def a_stop_token_is_kept(engine: Engine, rig: Rig) -> None:
    stop = rig.greedy[5]
    answer = await one(engine, ask(temperature=0.0, stop_token_ids=(stop,), ignore_eos=False))
    assert answer.token_ids == rig.greedy[: rig.greedy.index(stop) + 1]
    assert (answer.stop_reason, answer.matched) == ("stop", stop)


async def the_end_token_waits_for_min_new_tokens(engine: Engine, rig: Rig) -> None:
    end = rig.tokenizer.eos_token_id
    bias = {end: 1000.0}
    short = await one(engine, ask(ignore_eos=False, logit_bias=bias))
    assert short.token_ids == [end] and (short.stop_reason, short.matched) == ("stop", end)
    longer = await one(engine, ask(ignore_eos=False, logit_bias=bias, min_new_tokens=4))
    assert len(longer.token_ids) == 5 and longer.token_ids[-1] == end and end not in longer.token_ids[:-1]


async def samples_of_one_request_differ(engine: Engine, rig: Rig) -> None:
    answers = await engine.generate(ask(n=3, seed=5, max_new_tokens=24))
    assert len({tuple(a.token_ids) for a in answers}) == 3
    assert all(rig.gap(PROMPT, a) < TOLERANCE for a in answers)


async def a_seed_decides_where_it_is_honoured(engine: Engine, rig: Rig) -> None:
    if "seed" not in engine.capabilities.sampling:
        pytest.skip("this engine honours no seeds")
    first, again, other = [await one(engine, ask(seed=seed, max_new_tokens=24)) for seed in (1, 1, 2)]
    assert first.token_ids == again.token_ids != other.token_ids


async def an_abort_returns_what_was_sampled(engine: Engine, rig: Rig) -> None:
    for everything in (False, True):
        for wait in (0.05, 0.25, 0.8, 2.5, 8.0):  # on a busy machine nothing may have been sampled yet
            if await sampled_before_an_abort(engine, rig, everything, wait):
                break
        else:
            pytest.fail("nothing was sampled within 8 s")


async def sampled_before_an_abort(engine: Engine, rig: Rig, everything: bool, wait: float) -> int:
    """Aborts one request and then the other, or everything, after ``wait`` seconds; tokens of the first one."""
    long, short = ask(max_new_tokens=900), ask(max_new_tokens=900, n=2)
    tasks = [asyncio.create_task(engine.generate(request)) for request in (long, short)]
    await asyncio.sleep(wait)
    await engine.abort(None if everything else [short.id])
    cut = await tasks[1]
    if not everything:
        assert not tasks[0].done()
        await engine.abort([long.id, "not there"])
    (answer,) = await tasks[0]
    for one in (*cut, answer):  # only now: the engine goes on while this thread computes
        assert one.stop_reason == "abort" and len(one.token_ids) < 900
        if one.token_ids:
            assert rig.gap(PROMPT, one) < TOLERANCE
    return len(answer.token_ids)


async def ids_that_begin_alike_are_aborted_apart(engine: Engine, rig: Rig) -> None:
    requests = [replace(ask(max_new_tokens=900), id=name) for name in ("job/1", "job/11")]
    tasks = [asyncio.create_task(engine.generate(request)) for request in requests]
    await asyncio.sleep(0.05)
    await engine.abort(["job/1"])
    (first,), (second,) = await asyncio.gather(*tasks)
    assert first.stop_reason == "abort" and second.stop_reason == "length"


async def what_cannot_be_served_is_refused_and_harms_nobody(engine: Engine, rig: Rig) -> None:
    bad = {
        "at least one token": ask([]),
        "id 999": ask([5, 999]),
        "id -1": ask([-1]),
        "1024": ask([5] * 1020, max_new_tokens=30),
        "max_new_tokens=0": ask(max_new_tokens=0),
        "min_new_tokens=9": ask(min_new_tokens=9, max_new_tokens=8),
        "temperature=-1": ask(temperature=-1.0),
        "top_p=0": ask(top_p=0.0),
        "empty string": ask(stop=("",)),
        "logit_bias": ask(logit_bias={500: 1.0}),
        "nonesuch": ask(extra={"nonesuch": 1}),
    }
    for words, request in bad.items():
        good = asyncio.create_task(one(engine, ask(temperature=0.0)))
        with pytest.raises(EngineError, match=words) as raised:
            await engine.generate(request)
        assert request.id in str(raised.value)
        assert (await good).token_ids == rig.greedy[:12]


async def an_id_can_be_in_flight_once(engine: Engine, rig: Rig) -> None:
    request = ask(max_new_tokens=200)
    first = asyncio.create_task(engine.generate(request))
    await asyncio.sleep(0)
    with pytest.raises(EngineError, match="already in flight"):
        await engine.generate(request)
    await first


async def a_conversation_goes_on_from_its_own_tokens(engine: Engine, rig: Rig) -> None:
    ids, name = list(PROMPT), uuid4().hex
    await engine.open_sessions([name])
    for turn in range(4):
        answer = await one(engine, ask(ids, session=name, max_new_tokens=8))
        assert rig.gap(ids, answer) < TOLERANCE
        ids += [*answer.token_ids, 40 + turn]
    await engine.close_sessions([name])


async def requests_side_by_side_do_not_mix(engine: Engine, rig: Rig) -> None:
    chance = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 90, (n,), generator=chance).tolist() for n in range(1, 33)]
    answers = await asyncio.gather(*(one(engine, ask(p, max_new_tokens=4 + len(p) % 9)) for p in prompts))
    for prompt, answer in zip(prompts, answers, strict=True):
        assert len(answer.token_ids) == 4 + len(prompt) % 9
        assert rig.gap(prompt, answer) < TOLERANCE


async def a_cancelled_request_leaves_nothing_behind(engine: Engine, rig: Rig) -> None:
    task = asyncio.create_task(engine.generate(ask(max_new_tokens=900)))
    await asyncio.sleep(0.1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await engine.commit_weights(2)  # refused while anything runs


async def a_completion_carries_the_committed_version(engine: Engine, rig: Rig) -> None:
    for version in (3, 4):
        await engine.commit_weights(version)
        assert (await one(engine, ask())).weight_version == version


async def weights_are_not_committed_under_running_requests(engine: Engine, rig: Rig) -> None:
    task = asyncio.create_task(engine.generate(ask(max_new_tokens=900)))
    await asyncio.sleep(0.05)
    with pytest.raises(EngineError, match="cannot be committed"):
        await engine.commit_weights(9)
    await engine.abort()
    await task


CHECKS = [
    log_probs_are_the_learners,
    greedy_is_the_models_own,
    truncated_sampling_keeps_the_whole_distributions_log_probs,
    the_learner_knows_what_a_biased_log_prob_is_of,
    a_stop_string_is_found_in_whatever_tokens_and_kept,
    a_stop_string_that_ends_inside_a_token_keeps_the_token,
    a_stop_token_is_kept,
    the_end_token_waits_for_min_new_tokens,
    samples_of_one_request_differ,
    a_seed_decides_where_it_is_honoured,
    an_abort_returns_what_was_sampled,
    ids_that_begin_alike_are_aborted_apart,
    what_cannot_be_served_is_refused_and_harms_nobody,
    an_id_can_be_in_flight_once,
    a_conversation_goes_on_from_its_own_tokens,
    requests_side_by_side_do_not_mix,
    a_cancelled_request_leaves_nothing_behind,
    a_completion_carries_the_committed_version,
    weights_are_not_committed_under_running_requests,
]
