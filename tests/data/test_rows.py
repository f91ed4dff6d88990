"""A row as a prompt, in every form that files give it."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from skyrl_train.data.rows import plain, to_prompt
from skyrl_train.errors import DataError

GOOD = {"prompt": [{"role": "user", "content": "47+85"}], "env_class": "addition"}


def prompt(row, env_class=None, number=3):
    return to_prompt(row, file="some.jsonl", where="line 4", number=number, env_class=env_class)


def test_a_full_row():
    made = prompt(
        {**GOOD, "data_source": "sums", "reward_spec": {"ground_truth": "132"}, "extra_info": {"n": 1}, "q": 5}
    )
    assert made.uid == "sums/3"
    assert made.messages == ({"role": "user", "content": "47+85"},)
    assert made.env_class == "addition"
    assert made.data_source == "sums"
    assert made.extras == {"reward_spec": {"ground_truth": "132"}, "extra_info": {"n": 1}, "q": 5}


def test_the_least_row():
    made = prompt({"prompt": "47+85"}, env_class="addition")
    assert made.messages == ({"role": "user", "content": "47+85"},)
    assert (made.uid, made.env_class) == ("unknown/3", "addition")
    assert made.extras == {"reward_spec": {}, "extra_info": {}}


def test_the_row_names_its_env_before_the_config_does():
    assert prompt(GOOD, env_class="gsm8k").env_class == "addition"


@pytest.mark.parametrize("nothing", [None, math.nan])
def test_null_and_nan_mean_absent(nothing):
    made = prompt({**GOOD, "env_class": nothing, "extra_info": nothing, "data_source": nothing}, env_class="guess")
    assert (made.env_class, made.data_source, made.extras["extra_info"]) == ("guess", "unknown", {})


def test_columns_may_be_json_text():
    row = {
        "prompt": json.dumps(GOOD["prompt"]),
        "env_class": "e",
        "reward_spec": '{"ground_truth": "1"}',
        "extra_info": "{}",
    }
    assert prompt(row).messages == ({"role": "user", "content": "47+85"},)
    assert prompt(row).extras == {"reward_spec": {"ground_truth": "1"}, "extra_info": {}}


def test_a_prompt_about_json_is_a_text():
    assert prompt({"prompt": "[1, 2]", "env_class": "e"}).messages[0]["content"] == "[1, 2]"


@pytest.mark.parametrize("text", ["[-2,2]", '{"name": "call"}', "null"])
def test_a_ground_truth_is_decoded_only_where_the_row_says_so(text):
    spec = {"ground_truth": text}
    assert prompt({**GOOD, "reward_spec": spec}).extras["reward_spec"] == {"ground_truth": text}
    marked = prompt({**GOOD, "reward_spec": {**spec, "ground_truth_is_json": True}})
    assert marked.extras["reward_spec"] == {"ground_truth": json.loads(text)}


def test_the_column_reward_model_is_read_too():
    made = prompt({**GOOD, "reward_model": {"style": "rule", "ground_truth": "7"}})
    assert made.extras["reward_spec"] == {"style": "rule", "ground_truth": "7"}
    assert "reward_model" not in made.extras


def test_numpy_and_arrow_values_become_plain():
    import pyarrow as pa

    row = {
        "a": np.array([np.array([1, 2]), None], dtype=object),
        "b": np.float32(0.5),
        "c": {"kept": np.int64(3), "filled": None},
        "d": ("x",),
        "e": pa.scalar([1]),
    }
    made = plain(row)
    assert made == {"a": [[1, 2], None], "b": 0.5, "c": {"kept": 3}, "d": ["x"], "e": [1]}
    assert type(made["c"]["kept"]) is int


def test_messages_as_a_numpy_array_of_structs_with_null_fields():
    messages = np.array([{"role": "user", "content": "hi", "name": None}], dtype=object)
    assert prompt({"prompt": messages, "env_class": "e"}).messages == ({"role": "user", "content": "hi"},)


def user(content):
    return [{"role": "user", "content": content}]


BAD = {
    "no prompt": ({"question": "1+1"}, "column 'prompt' is missing or null (there are: question)"),
    "null prompt": ({"prompt": None}, "column 'prompt' is missing or null (there are: none)"),
    "NaN prompt": ({"prompt": math.nan}, "column 'prompt' is missing"),
    "number prompt": ({"prompt": 5}, "prompt=5 must be a list of chat messages or a text"),
    "one message": ({"prompt": user("x")[0]}, "must be a list of chat messages"),
    "no messages": ({"prompt": []}, "prompt=[] has no message"),
    "empty text": ({"prompt": "  "}, "is empty"),
    "empty content": ({"prompt": user("")}, "is empty"),
    "texts": ({"prompt": ["1+1"]}, "prompt[0]='1+1' must be a message"),
    "no role": ({"prompt": [{"content": "x"}]}, "prompt[0]={'content': 'x'} has no 'role'"),
    "no content": ({"prompt": [{"role": "user"}]}, "has no 'content'"),
    "null content": ({"prompt": user(None)}, "has no 'content'"),
    "unknown role": ({"prompt": [{"role": "usr", "content": "x"}]}, "role='usr' is not one of"),
    "role of sharegpt": ({"prompt": [{"role": "human", "content": "x"}]}, "Did you mean 'user'?"),
    "role in capitals": ({"prompt": [{"role": "User", "content": "x"}]}, "Did you mean 'user'?"),
    "role no text": ({"prompt": [{"role": 7, "content": "x"}]}, "prompt[0].role=7"),
    "content of parts": ({"prompt": user([{"type": "image"}])}, "prompt[0].content=[{'type': 'image'}] must be a text"),
    "half a surrogate": ({"prompt": user("\ud800")}, "half of a surrogate pair"),
    "answered": ({"prompt": [*user("x"), {"role": "assistant", "content": "y"}]}, "prompt[1].role='assistant'"),
    "env no text": ({**GOOD, "env_class": 5}, "env_class=5 must be the name of an environment"),
    "no env": ({"prompt": "x"}, "env_class=None must be the name of an environment. Add the column env_class"),
    "empty env": ({**GOOD, "env_class": " "}, "env_class=' '"),
    "source no text": ({**GOOD, "data_source": 5}, "data_source=5"),
    "reward_spec text": ({**GOOD, "reward_spec": "132"}, "reward_spec='132' must be an object with named fields"),
    "reward_spec list": ({**GOOD, "reward_spec": [1]}, "reward_spec=[1] must be an object"),
    "reward_spec half": ({**GOOD, "reward_spec": '{"ground'}, "reward_spec='{\"ground' must be an object"),
    "extra_info number": ({**GOOD, "extra_info": 1}, "extra_info=1 must be an object"),
    "truth not json": (
        {**GOOD, "reward_spec": {"ground_truth": "x", "ground_truth_is_json": True}},
        "reward_spec.ground_truth='x' must be JSON text",
    ),
    "truth absent": ({**GOOD, "reward_spec": {"ground_truth_is_json": True}}, "ground_truth=None must be JSON text"),
}


@pytest.mark.parametrize(("row", "text"), BAD.values(), ids=BAD)
def test_bad_rows_name_file_row_field_and_value(row, text):
    with pytest.raises(DataError) as caught:
        prompt(row)
    assert str(caught.value).startswith("some.jsonl: line 4: ")
    assert text in str(caught.value)
    assert len(str(caught.value)) < 400
