"""Evaluation: pass@k worked out, scores by source, and what failed counted as not passed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations
from math import comb
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skyrl_train.engines.base import Request
from skyrl_train.errors import EngineError, GenerationError
from skyrl_train.evaluator import Evaluator, eval_metrics, pass_at_k
from skyrl_train.tracking.run_folder import RunFolder
from skyrl_train.tracking.tracker import Tracker
from skyrl_train.types import Outcome, Prompt, Trajectory


@pytest.mark.parametrize(
    ("scores", "k", "expected"),
    [
        ([1, 0, 0, 0], 1, 1 / 4),
        ([1, 0, 0, 0], 2, 1 - 3 / 6),  # of the 6 pairs of four samples, 3 avoid the one that passed
        ([1, 0, 0, 0], 4, 1.0),
        ([0, 0], 1, 0.0),
        ([0, 0], 2, 0.0),
        ([1, 1], 2, 1.0),
        ([0.1, -1.0], 1, 0.5),  # passed: a positive reward
        ([1], 4, 1.0),  # fewer than k: whether any passed
        ([0], 4, 0.0),
    ],
)
def test_pass_at_k_worked_out(scores: list[float], k: int, expected: float) -> None:
    assert pass_at_k(scores, k) == pytest.approx(expected)


@given(st.lists(st.booleans(), min_size=1, max_size=8), st.data())
def test_pass_at_k_is_the_share_of_k_subsets_in_which_one_passes(passed: list[bool], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(passed)))
    share = sum(any(subset) for subset in combinations(passed, k)) / comb(len(passed), k)
    assert pass_at_k([float(p) for p in passed], k) == pytest.approx(share)


def test_metrics_by_source_and_over_all(trajectory: Callable[..., Trajectory]) -> None:
    made = [
        trajectory("x/0", 0, reward=1.0, data_source="x"),
        trajectory("x/0", 1, reward=0.0, data_source="x"),
        trajectory("y/0", 0, reward=0.5, data_source="y"),
        trajectory("y/0", 1, reward=9.0, data_source="y", outcome=Outcome.FAILED),
        trajectory("y/1", 0, reward=0.0, data_source="y", outcome=Outcome.TRUNCATED),
        trajectory("y/1", 1, reward=0.0, data_source="y"),
    ]
    assert eval_metrics(made) == {
        "eval/x/avg_score": 0.5, "eval/x/pass_at_1": 0.5, "eval/x/pass_at_2": 1.0, "eval/x/failed": 0.0,
        "eval/y/avg_score": 0.125, "eval/y/pass_at_1": 0.25, "eval/y/pass_at_2": 0.5, "eval/y/failed": 1.0,
        "eval/all/avg_score": 0.25, "eval/all/pass_at_1": pytest.approx(1 / 3),
        "eval/all/pass_at_2": pytest.approx(2 / 3), "eval/all/failed": 1.0,
    }  # fmt: skip


@pytest.mark.parametrize(("samples", "ks"), [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (4, [1, 2, 4]), (6, [1, 2, 4, 6])])
def test_k_doubles_up_to_the_number_of_samples(
    samples: int, ks: list[int], trajectory: Callable[..., Trajectory]
) -> None:
    metrics = eval_metrics([trajectory("x/0", i, data_source="x") for i in range(samples)])
    assert [int(name.rsplit("_", 1)[1]) for name in metrics if name.startswith("eval/x/pass_at")] == ks


@pytest.fixture
def evaluator(rig: Any, prompt: Callable[..., Prompt], tmp_path: Path) -> Callable[..., Evaluator]:
    def make(
        uids: Sequence[str], script: Callable[[Request], str], *, interval: int = 2, dump: bool = True, batch: int = 2
    ) -> Evaluator:
        folder = RunFolder(tmp_path / "run")
        prompts = [prompt(uid, data_source=uid[0]) for uid in uids]
        return Evaluator(
            rig(script, eval_n_samples_per_prompt=2).generator, prompts, interval=interval, batch_size=batch,
            total_steps=7, tracker=Tracker(folder), folder=folder if dump else None,
        )  # fmt: skip

    return make


def run(evaluator: Evaluator, step: int = 4) -> dict[str, float]:
    import asyncio

    return asyncio.run(evaluator.run_if_due(step))


def test_every_prompt_is_played_in_batches_and_written_down(
    evaluator: Callable[..., Evaluator], tmp_path: Path
) -> None:
    one = evaluator([f"x/{i}" for i in range(5)], lambda r: "good" if "x/3" in r.id else "bad")
    metrics = run(one)
    assert metrics["eval/x/avg_score"] == pytest.approx(0.2) == metrics["eval/all/avg_score"]
    assert metrics["eval/x/pass_at_2"] == pytest.approx(0.2) and metrics["eval/x/failed"] == 0
    written = (tmp_path / "run" / "trajectories" / "eval_step_000004.jsonl").read_text().splitlines()
    assert len(written) == 10
    order = {r.order for r in one.generator.rollout.engine.requests}  # type: ignore[attr-defined]
    assert order == {(place, sample, 0) for place in (0, 1) for sample in (0, 1)}  # two prompts in flight at once


def test_nothing_is_written_where_nobody_asked(evaluator: Callable[..., Evaluator], tmp_path: Path) -> None:
    run(evaluator(["x/0"], lambda _: "good", dump=False))
    assert not list((tmp_path / "run" / "trajectories").iterdir())


def test_the_size_of_the_batches_does_not_change_what_is_sampled(evaluator: Callable[..., Evaluator]) -> None:
    def script(request: Request) -> str:
        return "good" if (request.params.seed or 0) % 2 else "bad"

    uids = [f"x/{i}" for i in range(8)]
    assert run(evaluator(uids, script, batch=1)) == run(evaluator(uids, script, batch=5))


def test_a_batch_of_which_all_fails_costs_only_its_own_score(evaluator: Callable[..., Evaluator]) -> None:
    def script(request: Request) -> str:
        if "x/0" in request.id:
            raise EngineError("down")
        return "good"

    metrics = run(evaluator(["x/0", "y/0", "y/1"], script, batch=1))
    assert metrics["eval/x/avg_score"] == 0 and metrics["eval/x/failed"] == 2
    assert metrics["eval/y/avg_score"] == 1 and metrics["eval/all/failed"] == 2


def test_an_evaluation_without_one_usable_trajectory_is_an_error(evaluator: Callable[..., Evaluator]) -> None:
    def script(_: Request) -> str:
        raise EngineError("down")

    with pytest.raises(GenerationError, match=r"step 4: none of 4.*4 x EngineError: down"):
        run(evaluator(["x/0", "x/1"], script))


@pytest.mark.parametrize(
    ("interval", "due"), [(2, [0, 2, 4, 6, 7]), (7, [0, 7]), (100, [0, 7]), (1, list(range(8))), (-1, []), (0, [])]
)
def test_it_is_due_every_interval_and_after_the_last_step(
    evaluator: Callable[..., Evaluator], interval: int, due: list[int]
) -> None:
    one = evaluator(["x/0"], lambda _: "good", interval=interval)
    assert [step for step in range(8) if run(one, step)] == due


def test_without_prompts_there_is_nothing_to_evaluate(evaluator: Callable[..., Evaluator]) -> None:
    assert run(evaluator([], lambda _: "good", interval=1)) == {}
