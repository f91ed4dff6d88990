"""Hugging Face data sets: their names, the local cache, and no long wait where there is no network."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from skyrl_train.data import load_prompts
from skyrl_train.data.hub import split_name
from skyrl_train.errors import DataError, MissingPackageError


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        ("openai/gsm8k", ("openai/gsm8k", "train")),
        ("openai/gsm8k:test", ("openai/gsm8k", "test")),
        ("squad", ("squad", "train")),
        ("a/b:train[:10%]", ("a/b", "train[:10%]")),
        ("a/b/c", None),
        ("./a", None),
        ("/a/b", None),
        ("~/a", None),
        ("a b", None),
    ],
)
def test_names(source, parts):
    assert split_name(source) == parts


@pytest.fixture
def no_network(monkeypatch):
    """An address where nothing answers, as on a machine without a network."""
    pytest.importorskip("datasets")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")


@pytest.mark.usefixtures("no_network")
def test_without_a_network_the_error_comes_at_once_and_names_the_way_out():
    start = time.monotonic()
    with pytest.raises(DataError) as caught:
        load_prompts(["someone/no-such-data:test"])
    assert time.monotonic() - start < 10
    assert str(caught.value).startswith("someone/no-such-data: ")
    assert "hub cannot be reached" in str(caught.value)
    assert "give the path of a local file" in str(caught.value)


@pytest.mark.usefixtures("no_network")
def test_the_clients_own_setting_is_put_back():
    from datasets import config

    before = config.HF_HUB_OFFLINE
    with pytest.raises(DataError):
        load_prompts(["someone/no-such-data"])
    assert before == config.HF_HUB_OFFLINE


def test_a_missing_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingPackageError, match=r'pip install "skyrl-train\[data\]"'):
        load_prompts(["someone/data"])


def test_data_loads_without_torch_transformers_and_datasets():
    code = (
        "import sys, skyrl_train.data, skyrl_train.data.prepare.command as c\n"
        "from skyrl_train.data.prepare.table import PREPARERS, find_preparer\n"
        "[find_preparer(name) for name in PREPARERS]\n"
        "heavy = {'torch', 'transformers', 'datasets', 'pyarrow', 'numpy', 'reasoning_gym'} & sys.modules.keys()\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
