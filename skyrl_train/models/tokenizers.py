"""Tokenizers that can be made anywhere: one token for each printable character, or for each byte."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from skyrl_train.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WHOLE_WORDS = ("system", "user", "assistant", "<answer>", "</answer>")
"""One token each in the character tokenizer: the chat roles, and the tags that answers stand in."""

Kind = Literal["char", "byte"]


def make_tokenizer(kind: Kind = "char") -> PreTrainedTokenizerFast:
    """A fast tokenizer with a ChatML template and an exact round trip.

    Args:
        kind: "char" (printable ASCII, tabs and newlines; about 110 tokens; anything else becomes ``<unk>``), or "byte"
            (any text, 256 tokens and the special ones).

    Raises:
        ConfigError: another kind.
    """
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    if kind == "char":
        core = _characters()
    elif kind == "byte":
        core = _bytes()
    else:
        raise ConfigError("--tokenizer", kind, "there are char and byte.")
    core.add_special_tokens([AddedToken(token, special=True) for token in (PAD, START, END)])
    if kind == "char":
        core.add_tokens([AddedToken(word, normalized=False) for word in WHOLE_WORDS])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        eos_token=END,
        unk_token="<unk>" if kind == "char" else None,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def _characters():
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    printable = [*"\n\t", *map(chr, range(32, 127))]
    vocabulary = {token: i for i, token in enumerate(["<unk>", *printable])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    core.decoder = decoders.Fuse()
    return core


def _bytes():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    return core
