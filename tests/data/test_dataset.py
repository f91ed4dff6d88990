"""Several sources as one list of prompts."""

from __future__ import annotations

import json

import pytest

from skyrl_train.data import PromptDataset, load_prompts
from skyrl_train.errors import DataError


def row(text: str, **more) -> dict:
    return {"prompt": text, "env_class": "e", "data_source": "s", **more}


def test_sources_are_read_in_order(jsonl):
    a, b = jsonl(row("1"), row("2"), name="a.jsonl"), jsonl(row("3", data_source="t"), name="b.jsonl")
    data = load_prompts([str(b), str(a)])
    assert [p.messages[0]["content"] for p in data] == ["3", "1", "2"]
    assert [p.uid for p in data] == ["t/0", "s/0", "s/1"]
    assert data.per_source() == {"t": 1, "s": 2}
    assert (len(data), data[0].uid, [p.uid for p in data[1:]]) == (3, "t/0", ["s/0", "s/1"])


def test_uids_are_unique_over_files(jsonl):
    a, b = jsonl(row("1"), name="a.jsonl"), jsonl(row("2"), name="b.jsonl")
    assert [p.uid for p in load_prompts([str(a), str(b), str(b), str(b)])] == ["s/0", "s/b/0", "s/b/0#2", "s/b/0#3"]


def test_a_whole_folder(jsonl, tmp_path):
    jsonl(row("1"), name="b.jsonl")
    jsonl(row("2"), name="a.jsonl")
    assert [p.messages[0]["content"] for p in load_prompts([str(tmp_path)])] == ["2", "1"]


def test_one_source_may_stand_without_a_list(jsonl):
    assert len(load_prompts(str(jsonl(row("1"))))) == 1


def test_the_default_env(jsonl):
    assert load_prompts([str(jsonl({"prompt": "1"}))], env_class_default="gsm8k")[0].env_class == "gsm8k"


def test_structs_filled_with_nulls_by_parquet(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    infos = [{"a": 1}, {"b": [1, 2]}]
    pq.write_table(pa.Table.from_pylist([row("x", extra_info=i) for i in infos]), tmp_path / "a.parquet")
    assert [p.extras["extra_info"] for p in load_prompts([str(tmp_path / "a.parquet")])] == infos


def test_pandas_parquet_with_arrays_and_nan(tmp_path):
    pd = pytest.importorskip("pandas")
    frame = pd.DataFrame(
        {"prompt": [[{"role": "user", "content": "x"}]] * 2, "env_class": ["e", None], "f": [1.5, None]}
    )
    frame.to_parquet(tmp_path / "a.parquet")
    first, second = load_prompts([str(tmp_path / "a.parquet")], env_class_default="d")
    assert (first.env_class, second.env_class) == ("e", "d")
    assert first.extras["f"] == 1.5
    assert "f" not in second.extras


def test_too_long_prompts_are_dropped_and_counted(jsonl):
    data = load_prompts([str(jsonl(*(row("x" * n) for n in (3, 9, 4, 5))))])
    assert data.drop_longer_than(lambda messages: len(messages[0]["content"]), 4) == 2
    assert [p.uid for p in data] == ["s/0", "s/2"]
    assert data.drop_longer_than(lambda _: 4, 4) == 0


def test_all_too_long(jsonl):
    path = jsonl(row("xxx"), row("xxxxx"))
    with pytest.raises(DataError) as caught:
        load_prompts([str(path)]).drop_longer_than(lambda messages: len(messages[0]["content"]), 2)
    assert str(caught.value) == (
        f"{path}: all 2 prompts are longer than 2 tokens (the shortest has 3). Raise trainer.max_prompt_length."
    )


def test_dropping_from_nothing_is_nothing():
    assert PromptDataset([]).drop_longer_than(lambda _: 1, 1) == 0


def test_the_fingerprint_tells_data_apart(jsonl):
    def of(*rows) -> str:
        return load_prompts([str(jsonl(*rows))]).fingerprint()

    base = of(row("1"), row("2"))
    assert base == of(row("1"), row("2"))
    others = [
        of(row("2"), row("1")),
        of(row("1")),
        of(row("1"), row("2", env_class="other")),
        of(row("1"), row("2", reward_spec={"ground_truth": "3"})),
    ]
    assert len({base, *others}) == 5


@pytest.mark.parametrize(
    ("sources", "text"),
    [
        ([], "list of files is empty"),
        ([""], "'' is not the name"),
        ([None], "None is not the name"),
        (["a b"], "no such"),
    ],
)
def test_sources_that_are_none(sources, text):
    with pytest.raises(DataError, match=text):
        load_prompts(sources)


def test_a_bad_row_is_named_with_its_file(jsonl):
    path = jsonl(row("1"), {"question": "2"})
    with pytest.raises(DataError) as caught:
        load_prompts([str(path)])
    assert str(caught.value).startswith(f"{path}: line 2: the column 'prompt' is missing")


def test_a_bad_parquet_row_is_named_with_its_number(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist([row("1"), row("2"), row(None)]), path)  # type: ignore[arg-type]
    with pytest.raises(DataError) as caught:
        load_prompts([str(path)])
    assert str(caught.value).startswith(f"{path}: row 2: the column 'prompt' is missing or null")


def test_json_rows(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([row("1"), row("2")]))
    assert len(load_prompts([str(tmp_path / "a.json")])) == 2
