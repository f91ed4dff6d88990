"""The generator: who is made, with which seeds and parameters, and that every fate is counted."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skyrl_train.config.generator import SamplingConfig
from skyrl_train.engines.base import Request, SamplingParams
from skyrl_train.errors import EngineError, GenerationError
from skyrl_train.generator.generator import fate_metrics, rollout_metrics, sampling_params
from skyrl_train.types import Outcome, Prompt, Trajectory

from .games import Book, Replies

Make = Callable[..., Prompt]


def random_text(request: Request) -> str:
    """A policy whose words depend on the request's seed alone."""
    return "".join(random.Random(request.params.seed).choices("abcdefgh", k=5))


def play(rig: Any, prompts: list[Prompt], jitter: int, **config: Any) -> list[Trajectory]:
    """Three turns a trajectory; each answer comes after a pause that only ``jitter`` decides."""
    pauses = random.Random(jitter)
    config = {"n_samples_per_prompt": 3, "max_turns": 3} | config
    game = rig(random_text, Book(Replies, ["1", "2"]), delay=lambda _: pauses.random() * 0.03, **config)
    return game.run(*prompts)


def test_timing_decides_nothing(rig: Any, prompt: Make) -> None:
    prompts = [prompt("a/0"), prompt("b/0"), prompt("c/0")]
    first, second = play(rig, prompts, jitter=1), play(rig, prompts, jitter=2)
    assert first == second
    assert len({tuple(t.response_ids) for t in first}) == 9  # every sample is another one


def test_the_order_and_company_of_prompts_does_not_change_a_prompts_samples(rig: Any, prompt: Make) -> None:
    a, b, c = prompt("a/0"), prompt("b/0"), prompt("c/0")
    alone = {t.sample: t.response_ids for t in play(rig, [b], 1)}
    among = {t.sample: t.response_ids for t in play(rig, [c, b, a], 2) if t.prompt.uid == "b/0"}
    assert alone == among


def test_seed_step_and_purpose_each_change_the_samples(rig: Any, prompt: Make) -> None:
    def sampled(step: int = 1, purpose: str = "train", **config: Any) -> list[int]:
        game = rig(random_text, n_samples_per_prompt=1, **config)
        return game.run(prompt(), step=step, purpose=purpose)[0].response_ids

    ways = [sampled(), sampled(step=2), sampled(seed=43), sampled(purpose="eval"), sampled(sampling_params__seed=7)]
    assert len(set(map(tuple, ways))) == 5
    assert sampled(seed=1, sampling_params__seed=7) == sampled(seed=2, sampling_params__seed=7)


def test_trajectories_come_in_the_order_of_the_prompts_with_their_samples(rig: Any, prompt: Make) -> None:
    made = play(rig, [prompt("z/0"), prompt("a/0")], 3)
    assert [(t.prompt.uid, t.sample) for t in made] == [(uid, k) for uid in ("z/0", "a/0") for k in range(3)]


def test_evaluation_has_its_own_parameters_and_number_of_samples(rig: Any, prompt: Make) -> None:
    game = rig(
        n_samples_per_prompt=4, eval_n_samples_per_prompt=2, sampling_params__temperature=0.7,
        eval_sampling_params__top_k=5,
    )  # fmt: skip
    assert len(game.run(prompt())) == 4 and {r.params.temperature for r in game.engine.requests} == {0.7}
    game.engine.requests.clear()
    assert len(game.run(prompt(), purpose="eval")) == 2
    assert {(r.params.temperature, r.params.top_k, r.params.max_new_tokens) for r in game.engine.requests} == {
        (0.0, 5, 64)
    }


def test_every_sampling_key_reaches_the_engine_as_it_was_set() -> None:
    section = SamplingConfig(
        max_generate_length=9, min_new_tokens=2, temperature=0.5, top_p=0.9, top_k=7, min_p=0.1, repetition_penalty=1.2,
        frequency_penalty=0.3, presence_penalty=0.4, logit_bias={"5": -1.0}, stop="</a>", stop_token_ids=[3, 4],  # type: ignore[dict-item]
        ignore_eos=True,
    )  # fmt: skip
    assert sampling_params(section) == SamplingParams(
        max_new_tokens=9, min_new_tokens=2, temperature=0.5, top_p=0.9, top_k=7, min_p=0.1, repetition_penalty=1.2,
        frequency_penalty=0.3, presence_penalty=0.4, logit_bias={5: -1.0}, stop=("</a>",), stop_token_ids=(3, 4),
        ignore_eos=True,
    )  # fmt: skip
    assert sampling_params(SamplingConfig(stop=["a", "b"])).stop == ("a", "b")
    assert sampling_params(SamplingConfig()) == SamplingParams(max_new_tokens=1024)


def cut_and_whole(rig: Any, prompt: Make, **config: Any) -> list[Trajectory]:
    """Two samples with reward 1: the first is cut at four tokens, the second stops by itself."""
    game = rig(
        lambda r: "abcdef" if r.order[1] == 0 else "ab", Book(Replies, [], [1.0]), n_samples_per_prompt=2,
        sampling_params__max_generate_length=4, **config,
    )  # fmt: skip
    return game.run(prompt())


def test_a_cut_trajectory_counts_like_another_unless_said_otherwise(rig: Any, prompt: Make) -> None:
    cut, whole = cut_and_whole(rig, prompt)
    assert (cut.reward, sum(cut.loss_mask)) == (1.0, 4) and cut.outcome is Outcome.TRUNCATED
    assert (whole.reward, sum(whole.loss_mask)) == (1.0, 3) and whole.outcome is Outcome.FINISHED


def test_zero_reward_on_non_stop(rig: Any, prompt: Make) -> None:
    cut, whole = cut_and_whole(rig, prompt, zero_reward_on_non_stop=True)
    assert cut.rewards == [0.0] * 4 and cut.turns[0].reward == 0 and sum(cut.loss_mask) == 4
    assert whole.reward == 1.0


def test_apply_overlong_filtering(rig: Any, prompt: Make) -> None:
    cut, whole = cut_and_whole(rig, prompt, apply_overlong_filtering=True)
    assert cut.loss_mask == [0] * 4 and cut.reward == 1.0 and cut.usable  # it counts in the baseline, not in the loss
    assert sum(whole.loss_mask) == 3
    assert rollout_metrics([cut, whole])["response/length_mean"] == 3.5  # what was written, trained on or not


def test_a_stop_at_the_last_permitted_token_is_a_stop(rig: Any, prompt: Make) -> None:
    (made,) = rig(lambda _: "abc", n_samples_per_prompt=1, sampling_params__max_generate_length=4).run(prompt())
    assert made.stop_reason == "stop" and made.outcome is Outcome.FINISHED and len(made.response_ids) == 4


def test_metrics_worked_out(trajectory: Callable[..., Trajectory]) -> None:
    made = [
        trajectory("a/0", 0, ids=[1, 2], reward=1.0, env_class="guess"),
        trajectory("a/0", 1, ids=[1, 2, 3, 4], reward=0.0, env_class="guess", outcome=Outcome.TRUNCATED),
        trajectory("b/0", 0, ids=[1] * 9, reward=9.0, env_class="guess", outcome=Outcome.FAILED),
    ]
    made[0].metrics, made[1].metrics = {"won": 1.0}, {"won": 0.0, "guesses": 5.0}
    assert rollout_metrics(made) == {
        "response/length_mean": 3.0, "response/length_max": 4.0, "response/turns_mean": 1.0,
        "response/truncated": 0.5, "env/guess/won": 0.5, "env/guess/guesses": 5.0,
    }  # fmt: skip
    assert fate_metrics(made) == {
        "trajectories/finished": 1, "trajectories/truncated": 1, "trajectories/filtered": 0, "trajectories/stale": 0,
        "trajectories/failed": 1, "trajectories/started": 3, "prompts/started": 2, "prompts/used": 1, "prompts/lost": 1,
        "prompts/filtered": 0,
    }  # fmt: skip
    assert rollout_metrics(made[2:]) == {}


@settings(max_examples=40, deadline=None)
@given(data=st.data(), prompts=st.integers(1, 5), samples=st.integers(1, 4))
def test_fates_add_up(rig: Any, prompt: Make, data: st.DataObject, prompts: int, samples: int) -> None:
    fate = st.sampled_from(["good", "cut off here", "engine", "other"])
    told = {(i, k): data.draw(fate) for i in range(prompts) for k in range(samples)}

    def script(request: Request) -> str:
        says = told[request.order[0], request.order[1]]
        if says == "engine":
            raise EngineError("down")
        return says

    game = rig(script, n_samples_per_prompt=samples, sampling_params__max_generate_length=6)
    asked = [prompt(f"p/{i}") for i in range(prompts)]
    survivors = {i: sum(told[i, k] != "engine" for k in range(samples)) for i in range(prompts)}
    used = [i for i, n in survivors.items() if n > (samples > 1)]
    if not used:
        with pytest.raises(GenerationError):
            game.run(*asked)
        return
    made = game.run(*asked)
    metrics = fate_metrics(made)
    assert sum(metrics[f"trajectories/{o.value}"] for o in Outcome) == metrics["trajectories/started"] == len(told)
    assert metrics["trajectories/failed"] == sum(says == "engine" for says in told.values())
    assert metrics["trajectories/filtered"] == sum(n == 1 < samples for n in survivors.values())
    assert metrics["prompts/started"] == prompts and metrics["prompts/used"] == len(used)
    assert metrics["prompts/lost"] == prompts - len(used)
    assert all(t.cause for t in made if t.outcome is not Outcome.FINISHED)


def test_an_evaluation_of_which_all_fails_is_left_to_the_evaluator(rig: Any, prompt: Make) -> None:
    def down(request: Request) -> str:
        raise EngineError("down")

    (made,) = rig(down).run(prompt(), purpose="eval")
    assert made.outcome is Outcome.FAILED
    with pytest.raises(GenerationError):
        rig(down).run(prompt())


def test_no_prompt_gives_no_trajectory(rig: Any) -> None:
    assert rig().run() == []


class TestGreedyBaseline:
    """One greedy trajectory more for each prompt of training, whose reward is the others' baseline."""

    def game(self, rig: Any, env: Any = None, **config: Any) -> Any:
        asked: list[SamplingParams] = []

        def script(request: Request) -> str:
            asked.append(request.params)
            return "good" if request.params.temperature == 0 else "bad"

        game = rig(script, env, n_samples_per_prompt=2, **config)
        game.generator.greedy_baseline = True
        return game, asked

    def test_it_is_played_and_leaves(self, rig: Any, prompt: Make) -> None:
        game, asked = self.game(rig)
        made = game.run(prompt("a/0"), prompt("b/0"))
        assert [(t.sample, t.baseline, t.outcome) for t in made[:3]] == [
            (0, 1.0, Outcome.FINISHED), (1, 1.0, Outcome.FINISHED), (2, None, Outcome.FILTERED),
        ]  # fmt: skip
        assert made[2].cause == "the greedy baseline of its group"
        assert sorted(p.temperature for p in asked) == [0, 0, 1, 1, 1, 1]

    def test_the_samples_are_those_without_it(self, rig: Any, prompt: Make) -> None:
        plain, game = (rig(random_text, n_samples_per_prompt=2) for _ in range(2))
        game.generator.greedy_baseline = True
        ours = [t.response_ids for t in game.run(prompt()) if t.usable]
        assert ours == [t.response_ids for t in plain.run(prompt())]

    def test_evaluation_has_none(self, rig: Any, prompt: Make) -> None:
        game, _ = self.game(rig, eval_n_samples_per_prompt=1)
        made = game.run(prompt(), purpose="eval")
        assert len(made) == 1 and made[0].baseline is None

    def test_a_group_whose_baseline_failed_is_filtered(self, rig: Any, prompt: Make) -> None:
        class Fragile(Replies):
            def step(self, response: str) -> Any:
                if response == "good" and self.prompt.uid == "a/0":
                    raise RuntimeError("no such place")
                return super().step(response)

        game, _ = self.game(rig, Book(Fragile))
        made = game.run(prompt("a/0"), prompt("b/0"))
        assert [t.outcome for t in made[:3]] == [Outcome.FILTERED, Outcome.FILTERED, Outcome.FAILED]
        assert "the greedy trajectory of its group failed" in str(made[0].cause)
        assert [t.baseline for t in made[3:5]] == [0.0, 0.0]
        fates = fate_metrics(made)
        assert (fates["prompts/used"], fates["prompts/lost"]) == (1, 1)
