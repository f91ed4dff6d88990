"""Multi-turn conversations, token by token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skyrl_train.engines.base import Request
from skyrl_train.envs.base import StepResult
from skyrl_train.types import Outcome, Prompt, Trajectory

from .games import Book, Replies, user

EOS = "<|im_end|>"
REPLY = "\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


def says(*texts: str | list[int]) -> Callable[[Request], str | list[int]]:
    """A policy that says its texts, one a turn."""
    return lambda request: texts[request.order[-1]]


def spans(trajectory: Trajectory) -> list[tuple[int, int]]:
    return [(turn.start, turn.end) for turn in trajectory.turns]


def test_a_game_of_two_turns_token_by_token(rig: Any, prompt: Any) -> None:
    book = Book(Replies, ["higher"], [0.25, 1.0])
    game = rig(says("7", "9"), book, n_samples_per_prompt=1, max_turns=5)
    game.engine.version = 12
    (made,) = game.run(prompt(text="go"))

    observed = game.ids(REPLY.format("higher"))
    n = len(observed)
    assert made.prompt_ids == game.ids("<|im_start|>user\ngo<|im_end|>\n<|im_start|>assistant\n")
    assert made.response_ids == [*game.ids("7" + EOS), *observed, *game.ids("9" + EOS)]
    assert made.loss_mask == [1, 1, *[0] * n, 1, 1]
    assert made.rollout_logprobs == [-1.0, -1.0, *[0.0] * n, -1.0, -1.0]
    assert made.rewards == [0, 0.25, *[0.0] * n, 0, 1.0]
    assert spans(made) == [(0, 2), (2 + n, 4 + n)]
    assert [t.weight_version for t in made.turns] == [12, 12]
    assert [m["content"] for m in made.messages] == ["go", "7", "higher", "9"]
    assert (made.outcome, made.cause, made.stop_reason) == (Outcome.FINISHED, None, "stop")
    assert made.reward == 1.25 and made.metrics == {"turns": 2.0}
    assert book.envs[0].heard == ["7", "9"]  # without special tokens
    assert book.each_closed_once


def test_each_request_holds_exactly_what_came_before(rig: Any, prompt: Any) -> None:
    game = rig(says("7", "9", "8"), Book(Replies, ["higher", "lower"]), n_samples_per_prompt=1, max_turns=5)
    (made,) = game.run(prompt())
    whole = made.prompt_ids + made.response_ids
    for request, turn in zip(game.engine.requests, made.turns, strict=True):
        assert list(request.prompt_ids) == whole[: len(made.prompt_ids) + turn.start]
    assert [r.order for r in game.engine.requests] == [(0, 0, 0), (0, 0, 1), (0, 0, 2)]
    assert len({r.id for r in game.engine.requests}) == 3 and len({r.session for r in game.engine.requests}) == 1
    assert len({r.params.seed for r in game.engine.requests}) == 3


texts = st.text(st.sampled_from("ab 1<>\n"), max_size=6)


@settings(max_examples=40, deadline=None)
@given(answers=st.lists(texts, min_size=1, max_size=4), reply=texts)
def test_text_that_round_trips_gives_the_ids_of_the_whole_rendered_conversation(
    answers: list[str], reply: str, rig: Any, prompt: Any
) -> None:
    lines = [reply] * (len(answers) - 1)
    game = rig(says(*answers), Book(Replies, lines), n_samples_per_prompt=1, max_turns=9)
    (made,) = game.run(prompt())
    rendered = game.tokenizer.apply_chat_template(made.messages, tokenize=False)
    assert game.ids(rendered) == [*made.prompt_ids, *made.response_ids, *game.ids("\n")]


def test_tokens_that_no_text_gives_back_stay_as_they_were_sampled(rig: Any, prompt: Any) -> None:
    """`user` is one token; spelled letter by letter it decodes to the same text and would be tokenized otherwise."""
    spelled = [i for letter in "user" for i in _ids(rig, letter)]
    assert _ids(rig, "user") != spelled
    game = rig(says(spelled, "x"), Book(Replies, ["no"]), n_samples_per_prompt=1, max_turns=2)
    (made,) = game.run(prompt())
    assert made.response_ids[:4] == spelled
    assert list(game.engine.requests[1].prompt_ids)[len(made.prompt_ids) :][:4] == spelled
    assert made.messages[1]["content"] == "user"


def _ids(rig: Any, text: str) -> list[int]:
    return rig().ids(text)


@pytest.mark.parametrize(("append", "closing"), [(True, EOS), (False, "")])
def test_a_turn_that_a_stop_string_ended(append: bool, closing: str, rig: Any, prompt: Any) -> None:
    game = rig(n_samples_per_prompt=1, max_turns=2, append_eos_token_after_stop_str_in_multi_turn=append)
    game = rig(
        says(game.ids("a</answer>"), "b"), Book(Replies, ["go on"], [0.5, 0]), n_samples_per_prompt=1, max_turns=2,
        append_eos_token_after_stop_str_in_multi_turn=append,
    )  # fmt: skip
    (made,) = game.run(prompt())
    first = game.ids("a</answer>")
    observed = game.ids(closing + REPLY.format("go on"))
    assert made.response_ids == [*first, *observed, *game.ids("b" + EOS)]
    assert made.loss_mask == [*[1] * len(first), *[0] * len(observed), 1, 1]  # the closing EOS was not sampled
    assert made.rewards[len(first) - 1] == 0.5


class TestOneAssistantMessage:
    """``use_conversation_multi_turn=false``: all turns go on in one assistant message."""

    def play(self, rig: Any, prompt: Any, answers: Sequence[str | list[int]], rewards: Sequence[float] = (0.5, 1)):
        book = Book(Replies, ["<obs>"], rewards)
        game = rig(says(*answers), book, n_samples_per_prompt=1, max_turns=2, use_conversation_multi_turn=False)
        return game, game.run(prompt())[0]

    def test_an_eos_between_turns_is_taken_out_and_the_reward_moves(self, rig: Any, prompt: Any) -> None:
        game, made = self.play(rig, prompt, ["ab", "c"])
        observed = game.ids("<obs>")
        n = len(observed)
        assert made.response_ids == [*game.ids("ab"), *observed, *game.ids("c" + EOS)]
        assert made.loss_mask == [1, 1, *[0] * n, 1, 1]
        assert made.rewards == [0, 0.5, *[0.0] * n, 0, 1.0]
        assert len(made.rollout_logprobs) == len(made.response_ids)
        assert spans(made) == [(0, 2), (2 + n, 4 + n)]
        assert made.sampled == 4

    def test_a_stop_string_stays(self, rig: Any, prompt: Any) -> None:
        stop = rig().ids("a</answer>")
        game, made = self.play(rig, prompt, [stop, "c"])
        assert made.response_ids == [*stop, *game.ids("<obs>c" + EOS)]

    def test_the_reward_of_a_turn_that_was_only_eos_is_not_lost(self, rig: Any, prompt: Any) -> None:
        _, made = self.play(rig, prompt, ["", "c"])
        assert made.rewards[0] == 0.5 and made.loss_mask[0] == 1
        assert made.reward == 1.5 == sum(turn.reward for turn in made.turns)


def test_the_last_turn_that_max_turns_allows_gets_no_reply(rig: Any, prompt: Any) -> None:
    game = rig(says("a", "b"), Book(Replies, ["1", "2", "3"], [1, 2, 4]), n_samples_per_prompt=1, max_turns=2)
    (made,) = game.run(prompt())
    assert len(made.turns) == 2 and made.turns[-1].end == len(made.response_ids)
    assert made.outcome is Outcome.TRUNCATED and "max_turns=2" in (made.cause or "")
    assert made.reward == 3


def test_a_completion_cut_by_its_budget_ends_the_trajectory_and_is_still_judged(rig: Any, prompt: Any) -> None:
    book = Book(Replies, ["more"], [0.75])
    game = rig(says("abcdef", "x"), book, n_samples_per_prompt=1, max_turns=3, sampling_params__max_generate_length=4)
    (made,) = game.run(prompt())
    assert made.response_ids == game.ids("abcd") and made.rewards == [0, 0, 0, 0.75]
    assert (made.outcome, made.stop_reason) == (Outcome.TRUNCATED, "length")
    assert "max_generate_length" in (made.cause or "")
    assert made.turns[0].stop_reason == "length" and book.each_closed_once


def test_a_conversation_over_max_input_length_samples_no_further_turn(rig: Any, prompt: Any) -> None:
    game = rig(says("a", "b", "c"), Book(Replies, ["x" * 50] * 3, [1, 1]), n_samples_per_prompt=1, max_turns=9,
               max_input_length=100)  # fmt: skip
    (made,) = game.run(prompt())
    used = len(made.prompt_ids) + len(made.response_ids)
    assert len(made.turns) == 2 and used > 100
    assert len(game.engine.requests[-1].prompt_ids) <= 100
    assert (made.outcome, made.stop_reason) == (Outcome.TRUNCATED, "length")
    assert f"{used} tokens" in (made.cause or "") and "max_input_length=100" in (made.cause or "")
    assert made.reward == 2


@pytest.mark.parametrize(("over", "turns"), [(0, 2), (1, 1)])
def test_a_conversation_of_exactly_max_input_length_goes_on(over: int, turns: int, rig: Any, prompt: Any) -> None:
    game = rig(says("a", "b"), Book(Replies, ["x"]), n_samples_per_prompt=1, max_turns=2)
    (whole,) = game.run(prompt())
    second = len(whole.prompt_ids) + whole.turns[1].start
    game.config.max_input_length = second - over
    assert len(game.run(prompt())[0].turns) == turns


def test_the_first_turn_is_not_measured_by_max_input_length(rig: Any, prompt: Any) -> None:
    """Too long prompts were left out when the data was read, by ``trainer.max_prompt_length``."""
    (made,) = rig(says("a"), n_samples_per_prompt=1, max_input_length=1).run(prompt())
    assert made.outcome is Outcome.FINISHED and len(made.turns) == 1


class Ends(Replies):
    """Ends at once, in the way that it is told."""

    def step(self, response: str) -> StepResult:
        return StepResult(reward=1.0, **{str(self.lines[0]): True})


@pytest.mark.parametrize(("how", "outcome"), [("terminated", Outcome.FINISHED), ("truncated", Outcome.TRUNCATED)])
def test_the_env_says_how_it_ended(how: str, outcome: Outcome, rig: Any, prompt: Any) -> None:
    (made,) = rig(says("a"), Book(Ends, [how]), n_samples_per_prompt=1, max_turns=3).run(prompt())
    assert made.outcome is outcome and len(made.turns) == 1 and made.reward == 1


class Opens(Replies):
    """Opens with messages of its own, and keeps the list."""

    def init(self) -> list:
        self.mine = [user("mine")]
        return self.mine


def test_an_envs_own_opening_is_used_and_its_list_left_alone(rig: Any, prompt: Callable[..., Prompt]) -> None:
    book = Book(Opens, ["more"])
    game = rig(says("a", "b"), book, n_samples_per_prompt=1, max_turns=2)
    (made,) = game.run(prompt(text="theirs"))
    assert made.prompt_ids == game.ids("<|im_start|>user\nmine<|im_end|>\n<|im_start|>assistant\n")
    assert book.envs[0].mine == [user("mine")]


class Async(Replies):
    """The same game with async methods."""

    async def init(self) -> list:  # type: ignore[override]
        return super().init()

    async def step(self, response: str) -> StepResult:  # type: ignore[override]
        return super().step(response)


def test_async_envs_play_the_same(rig: Any, prompt: Any) -> None:
    (plain,) = rig(says("a", "b"), Book(Replies, ["x"], [0, 1]), n_samples_per_prompt=1, max_turns=2).run(prompt())
    (other,) = rig(says("a", "b"), Book(Async, ["x"], [0, 1]), n_samples_per_prompt=1, max_turns=2).run(prompt())
    assert (plain.response_ids, plain.rewards) == (other.response_ids, other.rewards)


def test_real_envs_play_through(rig: Any) -> None:
    """Guess-the-number, made by the registry: one wrong guess, then the right one."""
    from skyrl_train.config.environment import EnvironmentConfig
    from skyrl_train.envs.registry import make_env

    secret = {"secret": 5, "low": 1, "high": 7}
    asked = Prompt(
        uid="guess/0", messages=(user("guess 1..7"),), env_class="guess",
        extras={"reward_spec": {"ground_truth": secret}, "extra_info": {"max_turns": 3}},
    )  # fmt: skip
    game = rig(says("3", "5"), lambda p: make_env(p, EnvironmentConfig()), n_samples_per_prompt=1, max_turns=3)
    (made,) = game.run(asked)
    assert made.outcome is Outcome.FINISHED, made.cause
    assert len(made.turns) == 2 and "higher" in made.messages[2]["content"].lower()
    assert made.turns[1].reward == 1.0 and made.rewards[-1] == 1.0
