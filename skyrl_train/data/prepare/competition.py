"""``math``: competition problems. Raw files: math_train.json, math500_test.json, and AIME and AMC where present."""

from __future__ import annotations

from skyrl_train.data.files import read_rows
from skyrl_train.data.prepare.options import PrepareOptions, Row, Splits, make_row, text_of

HINT = "\nThink step by step and put the final answer into \\boxed{}."
_MORE = ("aime_2024", "amc_2022_2023")
"""Held-out sets that are written beside ``validation``, for ``data.val_data``, where the raw folder has them."""


def prepare(options: PrepareOptions) -> Splits:
    """MATH to train on, MATH-500 to validate with."""
    options.take()
    train = list(options.read("math_train.json", "DigitalLearningGmbH/MATH-lighteval"))
    held_out = list(options.read("math500_test.json", "HuggingFaceH4/MATH-500", split="test"))
    raw = {"train": train, "validation": held_out}
    for name in _MORE:
        if options.raw is not None and (options.raw.expanduser() / f"{name}.json").exists():
            raw[name] = [row for _, row in read_rows(options.raw_file(f"{name}.json"))]
    splits = {split: [made for row in rows if (made := _row(options, split, row))] for split, rows in raw.items()}
    splits["train"] = options.drop_seen(splits["train"], [row for s in splits if s != "train" for row in splits[s]])
    return splits


def boxed(solution: str) -> str | None:
    """What stands in the last ``\\boxed{...}``, braces inside it included; None if there is none."""
    start = solution.rfind("\\boxed{")
    if start < 0:
        return None
    begin, depth = start + len("\\boxed{"), 1
    for i in range(begin, len(solution)):
        depth += {"{": 1, "}": -1}.get(solution[i], 0)
        if depth == 0:
            return solution[begin:i]
    return None


def _row(options: PrepareOptions, split: str, raw: Row) -> Row | None:
    solution = raw.get("solution")
    answer = raw.get("answer")
    if answer is None and isinstance(solution, str):
        answer = boxed(solution)
    if isinstance(answer, float) and answer.is_integer():
        answer = int(answer)
    if answer is None or not str(answer).strip():
        options.dropped["no answer is known"] += 1
        return None
    source = "math" if split == "train" else {"validation": "math500"}.get(split, split)
    facts = {"subject": raw.get("subject") or raw.get("type")}
    facts |= {name: str(raw[name]) for name in ("level", "difficulty") if raw.get(name) is not None}
    return make_row(
        source,
        text_of(options, raw, "problem") + HINT,
        str(answer).strip(),
        env_class="math",
        extra_info={name: value for name, value in facts.items() if value is not None},
        worked=[solution] if split == "train" and isinstance(solution, str) else None,
    )
