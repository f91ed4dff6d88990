"""``gsm8k``: grade-school word problems. Raw files: train.jsonl and test.jsonl of openai/grade-school-math."""

from __future__ import annotations

import re

from skyrl_train.data.prepare.options import PrepareOptions, Row, Splits, make_row, text_of

HINT = '\nThink step by step, then give the answer on a last line of the form "#### NUMBER".'
_NOTE = re.compile(r"<<[^<>]*>>")
_ANSWER = re.compile(r"####\s*(-?[\d,]*\.?\d+)\s*$")


def prepare(options: PrepareOptions) -> Splits:
    """The published split; the calculator notes are taken out of the worked answers."""
    options.take()
    splits: Splits = {}
    for split, raw in (("train", "train"), ("validation", "test")):
        rows = options.read(f"{raw}.jsonl", "openai/gsm8k", split=raw, config="main")
        splits[split] = [made for row in rows if (made := _row(options, row))]
    splits["train"] = options.drop_seen(splits["train"], splits["validation"])
    return splits


def _row(options: PrepareOptions, raw: Row) -> Row | None:
    question, solution = text_of(options, raw, "question"), text_of(options, raw, "answer")
    found = _ANSWER.search(solution)
    if not found:
        options.dropped['the solution does not end in "#### NUMBER"'] += 1
        return None
    return make_row("gsm8k", question + HINT, found[1].replace(",", ""), worked=[_NOTE.sub("", solution)])
