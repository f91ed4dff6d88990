import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skyrl_train.envs.answers import canonical, last_boxed, last_tag, numbers


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("<answer>5</answer>", "5"),
        ("<answer>1</answer> no, <answer> 2 </answer>.", " 2 "),
        ("<answer>1<answer>2</answer>", "2"),
        ("<answer>1</answer><answer>2", "1"),
        ("<answer>", None),
        ("1</answer>", None),
        ("</answer><answer>", None),
        ("<answer></answer>", ""),
    ],
)
def test_last_tag(text: str, found: str | None) -> None:
    assert last_tag(text, "answer") == found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (r"so \boxed{5}.", "5"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed {7}", "7"),
        (r"\fbox{7}", "7"),
        (r"\boxed{\left\{1,2\right\}}", r"\left\{1,2\right\}"),
        (r"\boxed{1", None),
        (r"\boxed 5", None),
        ("5", None),
        (r"\boxed and then {5}", None),
    ],
)
def test_last_boxed(text: str, found: str | None) -> None:
    assert last_boxed(text) == found


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("18", "18"),
        ("018", "18"),
        ("18.", "18"),
        ("18.50", "18.5"),
        (".5", "0.5"),
        ("$1,234.00", "1234"),
        ("-$5", "-5"),
        ("$-5", "-5"),
        ("\u22125", "-5"),
        ("-0.0", "0"),
        ("", None),
        (".", None),
        ("-", None),
        ("1.2.3", None),
        ("1e5", None),
        ("\u0661\u0662", None),
        ("--5", None),
        ("nan", None),
        ("9" * 100_000, "9" * 100_000),
    ],
)
def test_one_spelling_for_each_number(text: str, number: str | None) -> None:
    assert canonical(text) == number


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("She has 16-3 = 13 eggs", ["16", "3", "13"]),
        ("It is -5, or $1,234.50.", ["-5", "1234.5"]),
        ("1,2,3", ["1", "2", "3"]),
        ("1,234,567 and 12,34", ["1234567", "12", "34"]),
        ("minus \u2212 7", ["-7"]),
        ("-$20", ["-20"]),
        ("2.5.", ["2.5"]),
        ("none", []),
    ],
)
def test_numbers_in_a_text(text: str, found: list[str]) -> None:
    assert list(numbers(text)) == found


@given(st.integers(-(10**12), 10**12))
def test_every_spelling_of_a_whole_number_is_the_same(n: int) -> None:
    spellings = [str(n), f"{n:,}", f"{n}.00", f" {n} "]
    assert {canonical(text) for text in spellings} == {str(n)}
    assert list(numbers(f"it is {n:,}.")) == [str(n)]


@given(st.text(alphabet="<>/answerboxed{}\\#-$,.0123456789 ", max_size=200))
def test_any_text_is_read_without_an_error(text: str) -> None:
    last_tag(text, "answer"), last_boxed(text), canonical(text), list(numbers(text))


@pytest.mark.parametrize("text", ["1," * 300_000, "-" * 600_000, "1" * 600_000, "$-" * 300_000, "1,111" * 100_000])
def test_numbers_take_time_linear_in_the_text(text: str) -> None:
    start = time.process_time()
    list(numbers(text))
    assert time.process_time() - start < 5
