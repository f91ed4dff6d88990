import json

import pytest
import torch
import yaml

from skyrl_train.data.dataset import load_prompts
from skyrl_train.entrypoints.cli import main
from skyrl_train.models.loading import load_model, load_tokenizer
from skyrl_train.models.warmup import CHECK_EVERY, exact_match
from skyrl_train.models.worked import worked_example

SMALL = {
    "model_type": "qwen3",
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Ten letters, each answered by itself in upper case; the folder also has a model config."""
    folder = tmp_path_factory.mktemp("letters")
    rows = [
        {
            "prompt": [{"role": "user", "content": letter}],
            "reward_spec": {"ground_truth": letter.upper()},
            "extra_info": {"worked": [{"role": "assistant", "content": letter.upper()}]},
        }
        for letter in "abcdefghij" * 20
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "small.yaml").write_text(yaml.safe_dump(SMALL))
    return folder


def warm_up(data, out, *more: str) -> int:
    options = ["--data", data / "rows.jsonl", "--model-config", data / "small.yaml", "--out", out, "--threads", 1]
    return main(["warmup", *map(str, options), "--lr", "0.01", "--batch-size", "32", *more])


def test_it_learns_stops_when_told_and_saves_an_ordinary_folder(data, tmp_path, capsys):
    assert warm_up(data, tmp_path / "m", "--steps", "100", "--until-accuracy", "0.9") == 0
    done = json.loads((tmp_path / "m" / "warmup.json").read_text())
    assert done["accuracy"] >= 0.9 and done["steps"] < 100 and done["steps"] % CHECK_EVERY == 0
    assert done["options"]["seed"] == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"warm-up step {CHECK_EVERY}/100  loss ")
    assert lines[-1].endswith(f"held-out accuracy {done['accuracy']:.0%}")
    model = load_model(str(tmp_path / "m"), dtype=torch.float32, device="cpu")
    tokenizer = load_tokenizer(str(tmp_path / "m"))
    rows = [worked_example(tokenizer, p) for p in load_prompts([str(data / "rows.jsonl")], env_class_default="none")]
    assert exact_match(model, rows, tokenizer.pad_token_id) >= 0.9


def test_a_seed_makes_one_model_and_another_seed_another(data, tmp_path):
    weights = []
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert warm_up(data, tmp_path / name, "--steps", "3", "--seed", seed, "--tokenizer", "byte") == 0
        weights.append((tmp_path / name / "model.safetensors").read_bytes())
    assert weights[0] == weights[1] != weights[2]


def test_too_few_steps_are_told_and_an_older_model_is_replaced(data, tmp_path, capsys):
    for _ in range(2):
        assert warm_up(data, tmp_path / "m", "--steps", "1") == 0
    assert "short of 40%: more --steps?" in capsys.readouterr().out


def test_characters_that_the_tokenizer_lacks_are_told(data, tmp_path, capsys):
    rows = (data / "rows.jsonl").read_text().replace("A", "é")
    (tmp_path / "rows.jsonl").write_text(rows)
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(SMALL))
    assert warm_up(tmp_path, tmp_path / "m", "--steps", "1") == 0
    assert "warning: 18 of 180 rows hold characters" in capsys.readouterr().err
    assert warm_up(tmp_path, tmp_path / "m", "--steps", "1", "--tokenizer", "byte") == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--steps", "0"], "--steps=0: must be 1 or more"),
        (["--batch-size", "-1"], "--batch-size=-1"),
        (["--eval-rows", "0"], "--eval-rows=0"),
        (["--threads", "0"], "--threads=0"),
        (["--lr", "0"], "--lr=0.0"),
        (["--lr", "nan"], "--lr=nan"),
        (["--until-accuracy", "35"], "--until-accuracy=35.0: is a share"),
        (["--seed", "-1"], "--seed=-1"),
        (["--model-config", "nowhere.yaml"], "--model-config='nowhere.yaml': cannot be read"),
        (["--data", "nowhere"], "nowhere"),
    ],
)
def test_options_that_cannot_be(data, tmp_path, capsys, options, words):
    assert warm_up(data, tmp_path / "m", *options) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and words in error and "Traceback" not in error
    assert not (tmp_path / "m").exists()


def test_a_folder_of_other_things_is_never_replaced(data, tmp_path, capsys):
    (tmp_path / "letters.txt").write_text("dear")
    assert warm_up(data, tmp_path, "--steps", "1") == 2
    assert "a model would replace it" in capsys.readouterr().err
    assert (tmp_path / "letters.txt").read_text() == "dear"
