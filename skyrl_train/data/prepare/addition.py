"""``addition``: a made-up task that a model of half a million parameters learns in a minute.

The answer is worked out column by column, from the right, with the carry as third summand::

    47+85        7+5+0=12;4+8+1=13;<answer>132</answer>
"""

from __future__ import annotations

import random
from zlib import crc32

from skyrl_train.data.prepare.options import PrepareOptions, Row, Splits, make_row
from skyrl_train.errors import ConfigError


def prepare(options: PrepareOptions) -> Splits:
    """A tenth of all pairs of operands, chosen by their checksum and not by the seed, is held out."""
    task = options.take(digits=2, size=10_000, validation_size=500)
    if not 1 <= task.digits <= 9:
        raise ConfigError("--digits", task.digits, "must be from 1 to 9.")
    pairs = _draw(10**task.digits, 2 * (task.size + 10 * task.validation_size), options.random("pairs"))
    train = [pair for pair in pairs if not held_out(*pair)]
    validation = [pair for pair in pairs if held_out(*pair)]
    return {
        "train": [_row(*pair) for pair in train[: task.size]],
        "validation": [_row(*pair) for pair in validation[: task.validation_size]],
    }


def held_out(a: int, b: int) -> bool:
    """Whether the pair belongs to the validation data, on every machine and with every seed."""
    return crc32(f"{a}+{b}".encode()) % 10 == 0


def work(a: int, b: int) -> str:
    """The worked answer of ``a + b``."""
    columns, carry = [], 0
    for place in range(max(len(str(a)), len(str(b)))):
        x, y = a // 10**place % 10, b // 10**place % 10
        columns.append(f"{x}+{y}+{carry}={x + y + carry};")
        carry = (x + y + carry) // 10
    return "".join(columns) + f"<answer>{a + b}</answer>"


def _draw(top: int, count: int, rng: random.Random) -> list[tuple[int, int]]:
    """Different pairs below ``top`` in random order: all there are, if they are few."""
    numbers = rng.sample(range(top * top), min(count, top * top))
    return [divmod(number, top) for number in numbers]


def _row(a: int, b: int) -> Row:
    return make_row("addition", f"{a}+{b}", str(a + b), worked=[work(a, b)])
