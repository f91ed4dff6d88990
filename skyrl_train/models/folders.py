"""What a model folder must hold, and where a hub name leads."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skyrl_train.errors import ModelError
from skyrl_train.storage.whole_folder import replace_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MAKE_ONE = "`skyrl warmup --data DIR --out FOLDER` makes a small model on any machine."
WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model.bin.index.json")
TOKENIZER = ("tokenizer*.json", "vocab.*", "*.model", "*.tiktoken", "merges.txt")

_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_PROBE_SECONDS = 5.0


def locate(path: str) -> tuple[str, dict[str, Any]]:
    """Where transformers is to look: an existing folder, or a hub name with the options that reach it.

    Raises:
        ModelError: there is no such folder, and no hub model can have this name.
    """
    folder = Path(path).expanduser()
    if path and folder.is_dir():
        return str(folder), {}
    if folder.is_file():
        raise ModelError(f"'{path}' is a file. Give the folder that holds config.json. {MAKE_ONE}")
    if not _HUB_NAME.fullmatch(path):
        raise ModelError(f"there is no folder '{path}'. {MAKE_ONE}")
    return path, {"local_files_only": not _hub_answers()}


def why_not(path: str, error: Exception, options: dict[str, Any]) -> str:
    """The error of a loader in one line, without advice that does not apply here."""
    if not options:
        return f"{type(error).__name__}: {one_line(error)}"
    if options["local_files_only"]:
        return (
            "there is no such folder, the Hugging Face hub cannot be reached (or HF_HUB_OFFLINE is set), and the local "
            f"cache does not hold it. {MAKE_ONE}"
        )
    return f"there is no such folder, and the Hugging Face hub says: {one_line(error)}"


def check_model_folder(path: str) -> None:
    """Looks for what any model folder has.

    Raises:
        ModelError: names the file that is absent or broken.
    """
    folder = Path(path)
    config = folder / "config.json"
    if not config.is_file():
        raise ModelError(f"'{path}' has no config.json: it is no Hugging Face model folder. {MAKE_ONE}")
    try:
        described = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"'{config}' is no readable JSON: {error}.") from error
    if not isinstance(described, dict) or "model_type" not in described:
        raise ModelError(f"'{config}' names no model_type, so the architecture is not known.")
    if not any(any(folder.glob(pattern)) for pattern in WEIGHTS):
        raise ModelError(f"'{path}' has a config but no weights (model.safetensors). {MAKE_ONE}")


def check_tokenizer_folder(path: str) -> None:
    """Raises ModelError if no file of the folder can be a tokenizer's."""
    if not any(any(Path(path).glob(pattern)) for pattern in TOKENIZER):
        raise ModelError(
            f"'{path}' has no tokenizer (tokenizer.json, tokenizer_config.json). Copy the tokenizer files of the model "
            f"it was trained from. {MAKE_ONE}"
        )


def save_pretrained(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, *, write: bool = True
) -> None:
    """Writes a Hugging Face folder beside ``folder`` and puts it there whole; an older model folder gives way.

    A model with an adapter is written merged: its folder loads anywhere, without PEFT.

    Args:
        write: of the workers of a sharded model, who all call this, the one that does.

    Raises:
        ModelError: something other than a model folder is there. It is left alone.
    """
    from skyrl_train.models.checkpoint_names import whole_state_dict
    from skyrl_train.models.quiet import quiet

    state = whole_state_dict(model, keep=write)

    def fill(partial: Path) -> None:
        with quiet():
            model.save_pretrained(partial, state_dict=state)
            tokenizer.save_pretrained(partial)

    if write:
        replace_folder(folder, fill)


def one_line(error: BaseException) -> str:
    """The message of an error without line breaks, 300 characters at most."""
    return " ".join(str(error).split())[:300] or type(error).__name__


@functools.cache
def _hub_answers() -> bool:
    """Whether the hub answers within five seconds. Left to itself its client retries for half a minute, per file."""
    import httpx
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        httpx.head(constants.ENDPOINT, timeout=_PROBE_SECONDS)
    except httpx.HTTPError:
        return False
    return True
