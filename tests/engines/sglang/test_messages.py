"""Bodies and answers, by hand."""

from __future__ import annotations

import pytest

from engines.contract import ask
from skyrl_train.engines.base import Completion, SamplingParams
from skyrl_train.engines.continuation import join, rest_of, split
from skyrl_train.engines.faults import EngineLostError, EngineRefusedError
from skyrl_train.engines.sglang.facts import UNKNOWN_VERSION, ServerFacts, version_numbers, version_of
from skyrl_train.engines.sglang.messages import NEVER, Answer, generate_body, sampling_body
from skyrl_train.errors import EngineError

FACTS = ServerFacts(url="http://h:1", version="0.5.17", incremental=True)


def event(ids: list[int], reason: dict | None = None, label: object = "3", **meta: object) -> dict:
    scored = [[-0.5 * i, i, None] for i in ids]
    return {"output_ids": ids, "meta_info": {"output_token_logprobs": scored, "finish_reason": reason,
                                             "weight_version": label, **meta}}  # fmt: skip


def test_only_what_is_on_is_sent_under_sglangs_names() -> None:
    assert sampling_body(SamplingParams(max_new_tokens=5), seeded=True) == {"max_new_tokens": 5, "temperature": 1.0}
    params = SamplingParams(
        max_new_tokens=5, min_new_tokens=2, temperature=0.5, top_p=0.9, top_k=7, min_p=0.1, repetition_penalty=1.1,
        frequency_penalty=0.2, presence_penalty=0.3, logit_bias={4: -1.0}, stop=("ab",), stop_token_ids=(8, 9),
        ignore_eos=True, seed=1 << 40,
    )  # fmt: skip
    assert sampling_body(params, seeded=False) == {
        "max_new_tokens": 5, "min_new_tokens": 2, "temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1,
        "repetition_penalty": 1.1, "frequency_penalty": 0.2, "presence_penalty": 0.3, "logit_bias": {"4": -1.0},
        "stop": ["ab", NEVER * 2], "no_stop_trim": True, "stop_token_ids": [8, 9], "ignore_eos": True,
    }  # fmt: skip
    assert sampling_body(params, seeded=True)["sampling_seed"] < 1 << 31


def test_the_body_of_a_request() -> None:
    request = ask([1, 2], extra={"stop_regex": "a+", "lora_path": "mine", "regex": None})
    body = generate_body(request, "rid", FACTS, adapter="ours", interval=64)
    assert body["lora_path"] == "mine" and body["stream"] and body["return_logprob"] and body["rid"] == "rid"
    assert body["sampling_params"]["stop_regex"] == "a+" and "regex" not in body["sampling_params"]
    assert generate_body(ask(), "rid", FACTS, adapter="ours")["lora_path"] == "ours"


def test_an_answer_grows_by_what_is_new_or_is_replaced() -> None:
    for incremental, second in ((True, [7]), (False, [5, 6, 7])):
        answer = Answer("u", incremental=incremental)
        answer.take(event([5, 6]))
        assert answer.completion().stop_reason == "abort"
        answer.take(event(second, {"type": "stop", "matched": 7}))
        found = answer.completion()
        assert (found.token_ids, found.logprobs) == ([5, 6, 7], [-2.5, -3.0, -3.5])
        assert (found.stop_reason, found.matched, found.weight_version) == ("stop", 7, 3)


@pytest.mark.parametrize(
    ("asked_at", "label", "spans", "version"),
    [
        (None, "default", None, UNKNOWN_VERSION),
        (3, "4", None, 3),  # begun with 3, ended with 4
        (4, "4", None, 4),
        (4, "default", None, UNKNOWN_VERSION),  # the server was restarted
        (3, "5", [{"version": "4"}, {"version": "5"}], 4),  # waited while 4 came
    ],
)
def test_the_version_is_that_of_the_oldest_token(asked_at, label, spans, version) -> None:
    answer = Answer("u", asked_at=asked_at)
    answer.take(event([5], {"type": "length"}, label, weight_versions=spans))
    assert answer.completion().weight_version == version


def test_what_does_not_fit_together_is_an_error() -> None:
    torn = event([5, 6])
    torn["output_ids"] = [5, 7]
    with pytest.raises(EngineError, match="log-probs of"):
        Answer("u").take(torn)
    diverged = event([5, 6])
    diverged["meta_info"]["output_token_logprobs"][1] = [None, 6, None]
    with pytest.raises(EngineError, match=r"no number.*diverged"):
        Answer("u").take(diverged)
    with pytest.raises(EngineRefusedError, match="too long"):
        Answer("u").take({"error": {"message": "too long"}})
    with pytest.raises(EngineRefusedError, match="HTTP 400: no"):
        Answer("u").take(event([], {"type": "abort", "status_code": 400, "message": "no"}))
    ended = Answer("u")
    ended.take(event([5, 6]))
    with pytest.raises(EngineLostError, match="was aborted") as lost:  # what a server says that is being ended
        ended.take({"error": {"message": "Request x was aborted", "code": 499}})
    assert lost.value.partial is not None and lost.value.partial.token_ids == [5, 6]
    with pytest.raises(EngineLostError, match="HTTP 503"):
        Answer("u").take(event([], {"type": "abort", "status_code": 503, "message": "no"}))


def test_versions_as_numbers() -> None:
    assert version_numbers("0.5.10.post1") == (0, 5, 10) and version_numbers("0.5.17+cpu") == (0, 5, 17)
    assert [version_of(x) for x in ("7", 7, "default", "-1", None, "v3", "²")] == [7, 7, -1, -1, -1, -1, -1]
    fatal = [
        ServerFacts(url="", version=v).flush_after_retract_is_fatal for v in ("0.5.9", "0.5.10", "0.5.20", "0.5.21")
    ]
    assert fatal == [False, True, True, False]


def test_a_broken_request_goes_on_with_the_budget_that_is_left() -> None:
    request = ask([1, 2], max_new_tokens=5, min_new_tokens=3, seed=4)
    part = Completion(token_ids=[7, 8], logprobs=[-1.0, -2.0], stop_reason="abort", weight_version=1)
    rest = rest_of(request, part)
    assert rest is not None and list(rest.prompt_ids) == [1, 2, 7, 8] and rest.id == request.id
    assert (rest.params.max_new_tokens, rest.params.min_new_tokens) == (3, 1)
    assert rest_of(request, Completion(token_ids=[1] * 5)) is None
    assert rest_of(request, Completion()) is request
    last = Completion(token_ids=[9], logprobs=[-3.0], matched=9, weight_version=2)
    whole = join([part, Completion(weight_version=0), last])
    assert (whole.token_ids, whole.logprobs) == ([7, 8, 9], [-1.0, -2.0, -3.0])
    assert (whole.stop_reason, whole.matched, whole.weight_version) == ("stop", 9, 1)
    assert [one.params.seed for one in split(ask(n=3, seed=4))] == [4, 5, 6]
    assert len({one.id for one in split(ask(n=3))}) == 3
