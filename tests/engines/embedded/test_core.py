"""Continuous batching: who runs when, and that nobody feels who else runs."""

import gc

import pytest
import torch

from skyrl_train.engines.embedded.engine import EmbeddedEngine
from skyrl_train.errors import EngineError

from .tiny import byte_tokenizer, gap, make_model, make_prompts, make_request, serve


def make_core(model=None, **kwargs):
    return EmbeddedEngine(model or make_model(), **({"deterministic": False} | kwargs)).core


def run(core, requests=()):
    """Submits, steps until nothing is ready, and returns the completions by request id."""
    for request in requests:
        core.submit(request)
    with core.runner.computing():
        while core.ready:
            core.step()
    return {end.request.id: end.error or end.completions for end in core.take_ended()}


@pytest.fixture(scope="module")
def model():
    return make_model()


def test_alone_or_together_the_tokens_are_the_same(model):
    prompts = make_prompts(12, seed=5)
    kinds = [{}, {"temperature": 0.7, "top_p": 0.9}, {"repetition_penalty": 1.3}, {"temperature": 0.0}]
    requests = [
        make_request(str(i), p, seed=i, max_new_tokens=5 + 3 * i, **kinds[i % 4]) for i, p in enumerate(prompts)
    ]
    together = run(make_core(model), requests)
    for request in requests:
        (alone,) = run(make_core(model), [request])[request.id]
        (crowded,) = together[request.id]
        assert alone.token_ids == crowded.token_ids
        assert alone.logprobs == pytest.approx(crowded.logprobs, abs=1e-4)


@pytest.mark.parametrize("slots", [1, 3, 16])
def test_more_requests_than_rows(model, slots):
    prompts = make_prompts(21, seed=6)
    requests = [make_request(str(i), p, seed=i, max_new_tokens=1 + i) for i, p in enumerate(prompts)]
    core = make_core(model, max_num_seqs=slots)
    few, all_at_once = run(core, requests), run(make_core(model), requests)
    assert core.cache.rows <= slots
    for name, (answer,) in all_at_once.items():
        assert few[name][0].token_ids == answer.token_ids


def test_waiting_requests_are_admitted_in_their_order(model):
    core = make_core(model, max_num_seqs=1)
    for place in (3, 1, 2, 0):
        core.submit(make_request(str(place), [5, 6], order=(place,), max_new_tokens=2))
    with core.runner.computing():
        while core.ready:
            core.step()
    assert [end.request.id for end in core.take_ended()] == ["0", "1", "2", "3"]


def test_samples_of_one_prompt_pay_for_it_once_and_match_the_plain_forward(model):
    prompt, core = make_prompts(1, seed=7, longest=30)[0], make_core(model)
    same = [make_request(f"twin{i}", prompt, seed=i) for i in range(3)]
    answers = run(core, [make_request("group", prompt, seed=9, n=4), *same, make_request("other", [7, 8], seed=1)])
    assert core.tokens_prefilled == len(prompt) + 2
    group = answers["group"]
    assert len({tuple(a.token_ids) for a in group}) == 4
    for answer in [*group, *(answers[f"twin{i}"][0] for i in range(3))]:
        assert gap(model, prompt, answer) < 1e-4
    assert answers["twin0"][0].token_ids == run(core, [make_request("twin0", prompt, seed=0)])["twin0"][0].token_ids


def test_n_on_fewer_rows_gives_the_same_samples(model):
    request = make_request("a", [9, 8, 7], seed=4, n=5)
    wide, narrow = run(make_core(model), [request])["a"], run(make_core(model, max_num_seqs=2), [request])["a"]
    assert [a.token_ids for a in wide] == [a.token_ids for a in narrow]


def test_long_prompts_go_in_several_passes_and_grow_the_cache(model):
    prompts = [[3 + (i + j) % 50 for j in range(n)] for i, n in enumerate((200, 3, 180, 90, 1, 200))]
    core = make_core(model, max_num_batched_tokens=250)
    answers = run(core, [make_request(str(i), p, seed=i, max_new_tokens=50) for i, p in enumerate(prompts)])
    for i, prompt in enumerate(prompts):
        assert gap(model, prompt, answers[str(i)][0]) < 1e-4


def test_a_late_request_joins_the_running_ones(model):
    core, first = make_core(model), make_request("first", [4, 5, 6], seed=0, max_new_tokens=90, ignore_eos=True)
    core.submit(first)
    with core.runner.computing():
        for _ in range(70):  # past the first reservation of the cache
            core.step()
    answers = run(core, [make_request("late", [9] * 80, seed=1)])
    assert gap(model, [4, 5, 6], answers["first"][0]) < 1e-4
    assert gap(model, [9] * 80, answers["late"][0]) < 1e-4


def test_end_of_sequence_and_stop_tokens(model):
    biased = {"logit_bias": {0: 100.0}, "seed": 1}
    core = make_core(model)
    answers = run(
        core,
        [
            make_request("eos", [5], **biased),
            make_request("ignored", [5], ignore_eos=True, **biased),
            make_request("token", [5], logit_bias={7: 100.0}, stop_token_ids=(7,)),
            make_request("later", [5], min_new_tokens=5, **biased),
            make_request("later token", [5], min_new_tokens=3, logit_bias={7: 100.0}, stop_token_ids=(7,), seed=2),
        ],
    )

    def shown(name):
        (answer,) = answers[name]
        return len(answer.token_ids), answer.stop_reason, answer.matched

    assert shown("eos") == (1, "stop", 0)
    assert shown("ignored") == (12, "length", None)
    assert shown("token") == (1, "stop", 7)
    assert shown("later") == (6, "stop", 0)  # five others first, then the end
    assert shown("later token") == (4, "stop", 7)


def test_a_stop_string_cuts_nothing_and_changes_nothing():
    tokenizer = byte_tokenizer()
    model = make_model(vocab_size=len(tokenizer))
    core = make_core(model, tokenizer=tokenizer)
    prompt = tokenizer.encode("question", add_special_tokens=False)
    free = run(core, [make_request("free", prompt, seed=3, max_new_tokens=40, ignore_eos=True)])["free"][0]
    pieces = [tokenizer.decode(free.token_ids[:n]) for n in range(41)]
    whole = next(n for n in range(8, 41) if "\ufffd" not in pieces[n][-3:] and len(pieces[n]) > len(pieces[n - 1]) > 3)
    stop = pieces[whole][-3:]
    first = next(n for n in range(1, 41) if stop in pieces[n])
    request = make_request("cut", prompt, seed=3, max_new_tokens=40, ignore_eos=True, stop=("never", stop))
    cut = run(core, [request])["cut"][0]
    assert (cut.stop_reason, cut.matched) == ("stop", stop)
    assert cut.token_ids == free.token_ids[:first]
    assert cut.logprobs == pytest.approx(free.logprobs[:first], abs=1e-5)
    held = run(core, [make_request("cut", prompt, seed=3, ignore_eos=True, stop=(stop,), min_new_tokens=12)])["cut"][0]
    assert len(held.token_ids) == 12


def test_seeds(model):
    def answer(seed):
        return tuple(run(make_core(model), [make_request("a", [5, 6, 7], seed=seed)])["a"][0].token_ids)

    assert answer(1) == answer(1)
    assert len({answer(seed) for seed in range(8)}) > 4
    assert len({answer(None) for _ in range(8)}) > 4


def test_abort_gives_what_there_is(model):
    core = make_core(model, max_num_seqs=2)
    for name in ("one", "two", "waits"):
        core.submit(make_request(name, [5, 6], seed=0, max_new_tokens=100, ignore_eos=True))
    with core.runner.computing():
        for _ in range(10):
            core.step()
    core.abort(["one", "waits", "unknown"])
    ended = {end.request.id: end.completions[0] for end in core.take_ended()}
    assert {name: a.stop_reason for name, a in ended.items()} == {"one": "abort", "waits": "abort"}
    assert (len(ended["one"].token_ids), ended["waits"].token_ids) == (11, [])
    assert gap(model, [5, 6], ended["one"]) < 1e-4
    (two,) = run(core)["two"]
    assert len(two.token_ids) == 100 and gap(model, [5, 6], two) < 1e-4


def test_a_request_with_logits_that_are_not_finite_fails_alone():
    model = make_model()
    healthy = [make_request(str(i), p, seed=i) for i, p in enumerate(make_prompts(4)) if 7 not in p]
    assert len(healthy) > 1
    healthy = [r for r in healthy if 7 not in run(make_core(model), [r])[r.id][0].token_ids]
    expected = {r.id: run(make_core(model), [r])[r.id][0].token_ids for r in healthy}
    core = make_core(model, max_num_seqs=3)
    with torch.no_grad():
        model.get_input_embeddings().weight[7] = float("nan")
    for _ in range(2):  # the second round uses the rows of the first
        answers = run(core, [make_request("sick", [5, 7, 6], n=2), *healthy])
        assert isinstance(answers.pop("sick"), EngineError)
        assert {name: a[0].token_ids for name, a in answers.items()} == expected
    assert core.in_flight == 0


def test_new_weights_are_used_and_the_old_cache_is_not():
    model = make_model()
    core, request = make_core(model), make_request("a", [5, 6, 7, 8], seed=0, max_new_tokens=20)
    before = run(core, [request])["a"][0]
    for version, change in ((1, lambda p: p.mul_(1.5)), (2, lambda p: p.data.copy_(p.data.flip(0)))):
        with torch.no_grad():
            for layer in model.model.layers:
                change(layer.self_attn.v_proj.weight)
                change(layer.mlp.up_proj.weight)
        core.commit(version)
        after = run(core, [request])["a"][0]
        assert after.weight_version == version
        assert after.token_ids != before.token_ids
        assert gap(model, [5, 6, 7, 8], after) < 1e-4
        before = after


def test_weights_are_not_committed_under_running_requests(model):
    core = make_core(model)
    core.submit(make_request("a", [5, 6], seed=0))
    with pytest.raises(EngineError, match="cannot be committed while 1 requests"):
        core.commit(1)
    run(core)
    core.commit(1)
    assert core.weight_version == 1


def test_training_mode_and_gradients_are_as_they_were():
    model = make_model(attention_dropout=0.5)
    model.train()
    core = make_core(model)
    answer = run(core, [make_request("a", [5, 6, 7], seed=0)])["a"][0]
    assert model.training
    model.eval()
    assert gap(model, [5, 6, 7], answer) < 1e-4
    model.train()
    model(input_ids=torch.tensor([[5, 6, 7]])).logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_memory_does_not_grow():
    model, sizes, tensors = make_model(), [], []
    core = make_core(model, max_num_seqs=8)
    requests = [
        make_request(str(i), p, seed=i, top_p=0.9, presence_penalty=0.1) for i, p in enumerate(make_prompts(20))
    ]
    for version in range(20):
        run(core, requests)
        core.commit(version)
        sizes.append(core.cache.nbytes)
        if version not in (2, 19):
            continue
        gc.collect()
        tensors.append(sum(type(o) is torch.Tensor for o in gc.get_objects()))
    assert len(set(sizes[1:])) == 1
    assert tensors[0] == tensors[1]
    assert core.in_flight == 0


BAD = [
    ({"prompt": []}, "prompt is empty"),
    ({"prompt": [5] * 250, "max_new_tokens": 20}, "exceeds the 256 tokens"),
    ({"prompt": [5, 61]}, "holds the id 61, and the model's vocabulary is 0 .. 60"),
    ({"prompt": [-1]}, "holds the id -1"),
    ({"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
    ({"min_new_tokens": 13}, "min_new_tokens=13"),
    ({"temperature": -0.1}, "temperature=-0.1"),
    ({"temperature": float("nan")}, "temperature=nan"),
    ({"top_p": 0.0}, "top_p=0.0"),
    ({"top_p": 1.5}, "top_p=1.5"),
    ({"top_k": -2}, "top_k=-2"),
    ({"min_p": 1.5}, "min_p=1.5"),
    ({"repetition_penalty": 0.0}, "repetition_penalty=0.0"),
    ({"n": 0}, "n=0"),
    ({"stop": ("",)}, "empty string"),
    ({"stop": ("x",)}, "needs a tokenizer"),
    ({"stop_token_ids": (99,)}, "stop_token_ids holds the id 99"),
    ({"logit_bias": {99: 1.0}}, "logit_bias holds the id 99"),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=[m for _, m in BAD])
def test_a_request_that_cannot_be_served_is_refused(model, changes, message):
    core = make_core(model)
    changes = dict(changes)
    with pytest.raises(EngineError) as raised:
        core.submit(make_request("bad", changes.pop("prompt", [5, 6]), **changes))
    assert message in str(raised.value) and "'bad'" in str(raised.value)
    assert core.in_flight == 0


def test_serving_through_the_engine_gives_the_same_as_the_core(model):
    requests = [make_request(str(i), p, seed=i) for i, p in enumerate(make_prompts(5))]
    through = serve(EmbeddedEngine(model, deterministic=False), requests)
    direct = run(make_core(model), requests)
    assert [a.token_ids for (a,) in through] == [direct[r.id][0].token_ids for r in requests]
