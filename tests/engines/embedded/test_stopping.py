"""Stop strings: found as soon as the text holds them, whatever the tokens' borders are."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skyrl_train.engines.embedded.stopping import StopText

from .tiny import byte_tokenizer

TOKENIZER = byte_tokenizer()


def decode(ids):
    return TOKENIZER.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def encode(text):
    return TOKENIZER.encode(text, add_special_tokens=False)


def first_match(stops, ids, prompt=()):
    """Where ``StopText`` stops: number of tokens, and the string."""
    matcher = StopText(stops, decode, prompt)
    for count, token in enumerate(ids, 1):
        found = matcher.push(token)
        if found is not None:
            return count, found
    return None


def expected_match(stops, ids):
    """The same from the definition: decode everything anew after each token."""
    for count in range(1, len(ids) + 1):
        text = decode(ids[:count])
        if text.endswith("\ufffd"):
            continue
        found = [(text.find(stop), -len(stop), stop) for stop in stops if stop in text]
        if found:
            return count, min(found)[2]
    return None


def test_a_stop_string_of_many_tokens():
    ids = encode("so <answer>12</answer> and more")
    assert len(encode("</answer>")) == 9
    assert first_match(["</answer>"], ids) == (len(encode("so <answer>12</answer>")), "</answer>")


def test_its_last_token_alone_does_not_stop():
    assert first_match(["</answer>"], encode("a > b, c > d, /answer>")) is None


def test_characters_of_several_bytes():
    assert first_match(["né€"], encode("x né€ y")) == (len(encode("x né€")), "né€")


def test_a_special_token_can_be_a_stop_string():
    assert first_match(["<end>"], [*encode("abc"), 0, *encode("d")]) == (4, "<end>")


def test_the_prompt_does_not_count():
    assert first_match(["ab"], encode("b ab"), prompt=encode("xxa")) == (4, "ab")


def test_the_string_that_starts_first_is_named_and_of_those_the_longer():
    tokens = ["ab</s>cd"]
    matcher = StopText(["s>", "</s>", "</s>c"], lambda ids: "".join(tokens[i] for i in ids), ())
    assert matcher.push(0) == "</s>c"


def test_bytes_that_never_become_a_character_do_not_pile_up():
    lone = encode("é")[0]
    matcher = StopText(["never"], decode, ())
    for _ in range(500):
        assert matcher.push(lone) is None
    assert len(matcher._ids) < 40


@settings(max_examples=200, deadline=None)
@given(
    text=st.text(alphabet="ab<é€ ", max_size=40),
    stops=st.lists(st.text(alphabet="ab<é€ ", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_the_same_as_decoding_everything_after_each_token(text, stops):
    ids = encode(text)
    assert first_match(stops, ids) == expected_match(stops, ids)


@pytest.mark.parametrize("prompt", ["", "a", "né", "long prompt before"])
def test_any_prompt(prompt):
    ids = encode("one two é three")
    assert first_match(["é th"], ids, encode(prompt)) == (len(encode("one two é th")), "é th")
