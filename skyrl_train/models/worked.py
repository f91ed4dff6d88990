"""Worked answers as tokens: what ``skyrl warmup`` learns from.

A row's ``extra_info.worked`` continues its ``prompt`` with messages; the assistant's are learned::

    <user> 7+5 <end> <assistant> | 7+5=12 <end>
    0      0   0     0           | 1      1          mask
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skyrl_train.data.dataset import load_prompts
from skyrl_train.errors import DataError
from skyrl_train.types import Message, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WRITE_SOME = "`skyrl data addition --out DIR` writes such rows."


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One worked conversation: all its tokens, and which of them the assistant wrote."""

    ids: list[int]
    mask: list[int]
    prompt_length: int

    @property
    def prompt(self) -> list[int]:
        return self.ids[: self.prompt_length]

    @property
    def answer(self) -> list[int]:
        """The assistant's first message, with its end."""
        rest = self.mask[self.prompt_length :]
        length = rest.index(0) if 0 in rest else len(rest)
        return self.ids[self.prompt_length : self.prompt_length + length]


def load_worked(data: str, hold_out: int) -> tuple[list[Prompt], list[Prompt]]:
    """Rows with a worked answer: to learn from, and up to ``hold_out`` to look at.

    Args:
        data: a folder of ``skyrl data``, whose validation rows are looked at; or one file, of which a tenth is kept
            back.

    Raises:
        DataError: the file cannot be read, or fewer than two rows have a worked answer.
    """
    folder = Path(data).expanduser()
    train_file = folder / "train.parquet" if folder.is_dir() else folder
    validation_file = folder / "validation.parquet"
    train = _with_work(train_file)
    held_out = _with_work(validation_file) if folder.is_dir() and validation_file.exists() else []
    if not held_out:
        kept = max(1, min(hold_out, len(train) // 10))
        train, held_out = train[:-kept], train[-kept:]
    if not train:
        raise DataError(f"{train_file}: fewer than two rows have extra_info.worked. {WRITE_SOME}")
    return train, held_out[:hold_out]


def worked_example(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> Example:
    """Tokens of a row's worked conversation, each message by itself, as a rollout would put them together.

    Raises:
        DataError: the row has no ``extra_info.worked`` that begins with the assistant, or a chat template that is not
            a prefix of itself when a message is added.
    """
    worked = _work_of(prompt)
    if not worked or worked[0].get("role") != "assistant":
        raise DataError(f"{prompt.uid}: no extra_info.worked that begins with an assistant message. {WRITE_SOME}")
    messages = list(prompt.messages)
    text = _render(tokenizer, messages, open_turn=True)
    ids = _tokens(tokenizer, text)
    mask, prompt_length = [0] * len(ids), len(ids)
    for place, message in enumerate(worked):
        messages.append(message)
        more_to_write = message["role"] != "assistant" and place + 1 < len(worked)
        after = _render(tokenizer, messages, open_turn=more_to_write)
        if not after.startswith(text):
            raise DataError(f"{prompt.uid}: the chat template changes earlier text when message {place} is added.")
        new, text = after[len(text) :], after
        wrote = _up_to_end(new, str(tokenizer.eos_token)) if message["role"] == "assistant" else 0
        for part, trained in ((new[:wrote], 1), (new[wrote:], 0)):
            tokens = _tokens(tokenizer, part)
            ids += tokens
            mask += [trained] * len(tokens)
    return Example(ids=ids, mask=mask, prompt_length=prompt_length)


def _with_work(file: Path) -> list[Prompt]:
    return [prompt for prompt in load_prompts([str(file)], env_class_default="none") if _work_of(prompt)]


def _work_of(prompt: Prompt) -> Sequence[Message] | None:
    return (prompt.extras.get("extra_info") or {}).get("worked")


def _up_to_end(text: str, end: str) -> int:
    """How much of an assistant's rendered message the model has to write: up to and with its end token."""
    place = text.rfind(end)
    return len(text) if place < 0 else place + len(end)


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False) if text else []


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[Any], *, open_turn: bool) -> str:
    return str(tokenizer.apply_chat_template(messages, add_generation_prompt=open_turn, tokenize=False))
