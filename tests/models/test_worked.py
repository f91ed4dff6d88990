import json
from pathlib import Path

import pytest

from skyrl_train.entrypoints.cli import main
from skyrl_train.errors import DataError
from skyrl_train.models.tokenizers import make_tokenizer
from skyrl_train.models.worked import load_worked, worked_example
from skyrl_train.types import Prompt

TOKENIZER = make_tokenizer()


def say(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def prompt(worked, *messages) -> Prompt:
    messages = messages or (say("user", "7+5"),)
    return Prompt(uid="sums/3", messages=messages, env_class="none", extras={"extra_info": {"worked": worked}})


def text(ids: list[int]) -> str:
    return TOKENIZER.decode(ids)


def learned(example) -> str:
    """The text with what is not learned replaced by one dot for each stretch of it."""
    parts, last = [], 1
    for token, mask in zip(example.ids, example.mask, strict=True):
        parts.append(text([token]) if mask else "." * last)
        last = mask
    return "".join(parts)


def test_one_answer():
    example = worked_example(TOKENIZER, prompt([say("assistant", "12")]))
    assert text(example.ids) == "<|im_start|>user\n7+5<|im_end|>\n<|im_start|>assistant\n12<|im_end|>\n"
    assert learned(example) == ".12<|im_end|>."
    assert text(example.prompt).endswith("assistant\n")
    assert text(example.answer) == "12<|im_end|>"


def test_a_conversation_is_put_together_as_a_rollout_would():
    turns = [say("assistant", "5"), say("user", "higher"), say("assistant", "7")]
    example = worked_example(TOKENIZER, prompt(turns, say("system", "play"), say("user", "go")))
    whole = TOKENIZER.apply_chat_template([say("system", "play"), say("user", "go"), *turns], tokenize=False)
    assert text(example.ids) == whole
    assert learned(example) == ".5<|im_end|>.7<|im_end|>."
    assert text(example.answer) == "5<|im_end|>"


@pytest.mark.parametrize("worked", [None, [], [say("user", "x")]])
def test_a_row_without_work_is_refused(worked):
    with pytest.raises(DataError, match=r"sums/3: no extra_info.worked.*skyrl data addition"):
        worked_example(TOKENIZER, prompt(worked))


def test_a_template_that_rewrites_the_past_is_refused():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(DataError, match="sums/3: the chat template changes earlier text when message 0"):
        worked_example(tokenizer, prompt([say("assistant", "12")]))


def write(path: Path, count: int, first: int = 0, worked: bool = True) -> None:
    rows = [
        {
            "prompt": [say("user", f"{n}+1")],
            "reward_spec": {"ground_truth": str(n + 1)},
            "extra_info": {"worked": [say("assistant", str(n + 1))]} if worked else {"other": 1},
        }
        for n in range(first, first + count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def asks(rows) -> set[str]:
    return {row.messages[0]["content"] for row in rows}


def test_a_single_file_is_looked_at_in_rows_that_are_not_learned(tmp_path):
    write(tmp_path / "rows.jsonl", 50)
    train, held_out = load_worked(str(tmp_path / "rows.jsonl"), hold_out=128)
    assert (len(train), len(held_out)) == (45, 5)
    assert not asks(train) & asks(held_out)


def test_rows_without_work_are_left_out_and_none_at_all_is_an_error(tmp_path):
    write(tmp_path / "rows.jsonl", 3, worked=False)
    with pytest.raises(DataError, match=r"fewer than two rows have extra_info.worked"):
        load_worked(str(tmp_path / "rows.jsonl"), hold_out=5)
    write(tmp_path / "one.jsonl", 1)
    with pytest.raises(DataError, match="fewer than two rows"):
        load_worked(str(tmp_path / "one.jsonl"), hold_out=5)


def test_a_folder_brings_its_own_validation_rows(tmp_path):
    assert main(["data", "addition", "--out", str(tmp_path)]) == 0
    train, held_out = load_worked(str(tmp_path), hold_out=20)
    assert len(held_out) == 20 and len(train) > 1000
    assert not asks(train) & asks(held_out)


@pytest.mark.parametrize("name", ["missing.parquet", "missing"])
def test_data_that_is_not_there(tmp_path, name):
    with pytest.raises(DataError):
        load_worked(str(tmp_path / name), hold_out=5)
