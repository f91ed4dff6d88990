import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from skyrl_train.errors import ConfigError
from skyrl_train.models.tokenizers import CHAT_TEMPLATE, make_tokenizer

CHAR, BYTE = make_tokenizer("char"), make_tokenizer("byte")
PRINTABLE = "".join(map(chr, range(32, 127))) + "\n\t"
SNIPPETS = ["<answer>", "</answer>", "user", "assistant", "<|im_end|>", "<|im_start|>", "<", "12", " ", "\n"]


def tokens(tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.one_of(st.text(PRINTABLE, max_size=20), st.sampled_from(SNIPPETS))).map("".join))
def test_char_round_trip(text):
    assert CHAR.decode(tokens(CHAR, text)) == text
    assert CHAR.unk_token_id not in tokens(CHAR, text)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.one_of(st.text(max_size=20), st.sampled_from(SNIPPETS))).map("".join))
def test_byte_round_trip(text):
    text = text.encode(errors="replace").decode()  # lone surrogates are no text
    assert BYTE.decode(tokens(BYTE, text)) == text


@settings(max_examples=50, deadline=None)
@given(st.text(PRINTABLE, max_size=20), st.text(PRINTABLE, max_size=20))
def test_a_token_never_joins_what_two_pieces_say(a, b):
    pieces = tokens(BYTE, a) + tokens(BYTE, b)
    assert BYTE.decode(pieces) == a + b
    assert tokens(BYTE, a + b) == pieces


@pytest.mark.parametrize("kind", ["char", "byte"])
def test_it_is_an_ordinary_saved_tokenizer(kind, tmp_path):
    made = make_tokenizer(kind)
    made.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "12+7=19; <answer>19</answer>"
    assert loaded.is_fast
    assert loaded.encode(text) == made.encode(text) == tokens(made, text)  # nothing is added around a text
    assert (loaded.eos_token, loaded.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert loaded.chat_template == CHAT_TEMPLATE
    assert max(loaded.get_vocab().values()) == len(loaded) - 1
    assert loaded.decode(loaded.encode("a<|im_end|>"), skip_special_tokens=True) == "a"


@pytest.mark.parametrize("kind", ["char", "byte"])
def test_the_template_grows_at_its_end_only(kind):
    tokenizer = make_tokenizer(kind)
    messages, before = [], ""
    for role in ("system", "user", "assistant", "user", "assistant"):
        messages.append({"role": role, "content": f"I am {role}"})
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        assert text.startswith(before)
        assert tokens(tokenizer, before) + tokens(tokenizer, text[len(before) :]) == tokens(tokenizer, text)
        before = text
    opened = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert opened == before + "<|im_start|>assistant\n"


def test_sizes():
    assert len(CHAR) == 106
    assert len(BYTE) == 259
    assert len(tokens(CHAR, "<answer>12</answer>")) == 4
    assert tokens(CHAR, "é") == [CHAR.unk_token_id]


def test_another_kind_is_refused():
    with pytest.raises(ConfigError, match=r"--tokenizer='word'.*char and byte"):
        make_tokenizer("word")
