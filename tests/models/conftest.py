"""A good model folder, made once, and copies of it to break."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from skyrl_train.models.folders import save_pretrained
from skyrl_train.models.tokenizers import make_tokenizer

from .helpers import make_model


@pytest.fixture(scope="session")
def good_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3 model of random weights with a character tokenizer."""
    folder, tokenizer = tmp_path_factory.mktemp("model") / "good", make_tokenizer()
    save_pretrained(make_model("qwen3", vocab_size=len(tokenizer)), tokenizer, folder)
    return folder


@pytest.fixture
def copy(good_folder: Path, tmp_path: Path) -> Callable[[], Path]:
    """Makes a copy of the good folder that a test may break."""

    def make() -> Path:
        return Path(shutil.copytree(good_folder, tmp_path / "copy"))

    return make
