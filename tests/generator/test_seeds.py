"""Seeds follow from what is sampled and from nothing else."""

from __future__ import annotations

from itertools import product

from hypothesis import given
from hypothesis import strategies as st

from skyrl_train.generator.seeds import derive_seed

parts = st.tuples(st.integers(0, 9), st.sampled_from(["train", "eval"]), st.integers(0, 99), st.text(max_size=5))


def test_a_seed_is_the_same_on_every_machine() -> None:
    assert derive_seed(42, "train", 1, "gsm8k/7", 0, 0) == 7461487331985046213


@given(parts, parts)
def test_seeds_fit_63_bits_and_differ_exactly_where_the_parts_do(one: tuple, other: tuple) -> None:
    assert 0 <= derive_seed(*one) < 2**63
    assert (derive_seed(*one) == derive_seed(*other)) is (one == other)


def test_neighbours_do_not_collide() -> None:
    seeds = {derive_seed(42, "train", step, f"a/{i}", k, turn) for step, i, k, turn in product(*[range(12)] * 4)}
    assert len(seeds) == 12**4
    assert derive_seed(1, 23) != derive_seed(12, 3)
