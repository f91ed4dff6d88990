"""``wordle``: guess a word of five letters. Raw file: words.txt, one word a line."""

from __future__ import annotations

from skyrl_train.data.prepare.options import PrepareOptions, Row, Splits, hold_out, make_row
from skyrl_train.errors import DataError


def prepare(options: PrepareOptions) -> Splits:
    """Every word is a hidden word; 500 are held out. The list is written too, as the env may want it: words.txt."""
    task = options.take(max_turns=6, validation_size=500)
    path = options.raw_file("words.txt")
    try:
        lines = path.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: the file cannot be read ({error}).") from error
    words = list(dict.fromkeys(line.lower() for line in lines))
    good = [word for word in words if len(word) == 5 and word.isascii() and word.isalpha()]
    options.dropped["not a word of five letters"] += len(words) - len(good)
    if len(good) < 2:
        raise DataError(f"{path}: holds {len(good)} words of five letters; at least 2 are needed.")
    (options.out / "words.txt").write_text("\n".join(sorted(good)) + "\n", encoding="utf-8")
    train, held_out = hold_out(good, task.validation_size, options.random("split"))
    return {
        "train": [_row(word, task.max_turns) for word in train],
        "validation": [_row(word, task.max_turns) for word in held_out],
    }


def _row(word: str, max_turns: int) -> Row:
    prompt = (
        f"Find the hidden word of five letters in {max_turns} guesses. After each guess you are told for every letter "
        "whether it is at the right place (G), elsewhere in the word (Y), or not in it (-). "
        "Write each guess as <guess>WORD</guess>."
    )
    return make_row("wordle", prompt, word, extra_info={"max_turns": max_turns})
