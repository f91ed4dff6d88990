"""``countdown``: reach a target with numbers. Raw files: train.jsonl, test.jsonl (numbers, target, expression)."""

from __future__ import annotations

from skyrl_train.data.prepare.options import PrepareOptions, Row, Splits, hold_out, make_row
from skyrl_train.errors import DataError


def prepare(options: PrepareOptions) -> Splits:
    """The raw split; of the hub's data set, which has none, 1,000 rows are held out."""
    task = options.take(validation_size=1000)
    hub = "Jiayi-Pan/Countdown-Tasks-3to4"
    if options.raw is None:
        train, held_out = hold_out(
            list(options.read("train.jsonl", hub)), task.validation_size, options.random("split")
        )
    else:
        train, held_out = list(options.read("train.jsonl", hub)), list(options.read("test.jsonl", hub))
        held_out = held_out[: task.validation_size]
    validation = [_row(options, row) for row in held_out]
    seen = {_puzzle(row) for row in held_out}
    kept = [row for row in train if _puzzle(row) not in seen]
    options.dropped["the same puzzle is in the validation data"] += len(train) - len(kept)
    return {"train": [_row(options, row) for row in kept], "validation": validation}


def _row(options: PrepareOptions, raw: Row) -> Row:
    numbers, target = raw.get("numbers", raw.get("nums")), raw.get("target")
    if not isinstance(numbers, list) or not isinstance(target, int):
        raise DataError(f"{options.name}: a raw row lacks 'numbers' or 'target': {raw!r:.80}")
    listed = ", ".join(map(str, numbers))
    prompt = (
        f"Make {target} from the numbers {listed}. Use each number exactly once, with + - * / and brackets. "
        "Give the expression as <answer>EXPRESSION</answer>."
    )
    solution = raw.get("expression")
    worked = [f"<answer>{solution}</answer>"] if isinstance(solution, str) else None
    return make_row("countdown", prompt, {"numbers": numbers, "target": target}, worked=worked)


def _puzzle(raw: Row) -> tuple[tuple[int, ...], int | None]:
    return tuple(sorted(raw.get("numbers") or raw.get("nums") or ())), raw.get("target")
