"""What goes in comes out, tuples included."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skyrl_train.data.truth import decode, encode

leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
values = st.recursive(
    leaves,
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(st.text(), inner),
    max_leaves=12,
)


@given(values)
def test_round_trip(value):
    assert decode(encode(value)) == value


def test_what_json_lacks_becomes_the_nearest_thing():
    import numpy as np

    assert decode(encode({"s": {3, 1}, "a": np.arange(2), 1: np.float64(0.5)})) == {"s": [1, 3], "a": [0, 1], "1": 0.5}


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000])
def test_not_json_is_a_value_error(text):
    with pytest.raises(ValueError):
        decode(text)
