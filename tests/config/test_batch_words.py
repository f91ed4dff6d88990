"""The line at start, and the example of the page that explains it."""

from __future__ import annotations

import pytest

from config.conftest import ROOT
from skyrl_train.config.batch_words import describe
from skyrl_train.config.load import from_mapping


def test_the_page_shows_what_the_line_says() -> None:
    config = from_mapping({
        "trainer": {"train_batch_size": 256, "policy_mini_batch_size": 64, "micro_train_batch_size_per_gpu": 32},
        "generator": {"n_samples_per_prompt": 8},
    })  # fmt: skip
    line = describe(config)
    assert line.startswith(
        "256 prompts x 8 samples = 2,048 trajectories a step, 4 updates of 512, 64 micro-batches of 32;"
    )
    page = " ".join((ROOT / "docs" / "batch_words.md").read_text().replace("\n> ", " ").split())
    assert line in page


@pytest.mark.parametrize(
    ("trainer", "generator", "words"),
    [
        # 2 passes x 2 updates of 2 x 3 = 6 sequences; 8192 / 1536 = 5 fit, 3 is the divisor of 6 below
        ({"train_batch_size": 4, "policy_mini_batch_size": 2, "update_epochs_per_batch": 2},
         {"n_samples_per_prompt": 3},
         "4 prompts x 3 samples = 12 trajectories a step, 4 updates of 6 (2 passes), 8 micro-batches of 3"),
        ({"train_batch_size": 1, "policy_mini_batch_size": 1, "micro_train_batch_size_per_gpu": 1},
         {"n_samples_per_prompt": 1, "max_turns": 3},
         "1 prompt x 1 sample = 1 trajectory a step, 1 update of 1, 1 micro-batch of 1;"),
    ],
)  # fmt: skip
def test_counts(trainer: dict[str, int], generator: dict[str, int], words: str) -> None:
    assert describe(from_mapping({"trainer": trainer, "generator": generator})).startswith(words)


def test_turns_are_told() -> None:
    assert describe(from_mapping({"generator": {"max_turns": 3}})).endswith("1,024 tokens in each of at most 3 turns")
