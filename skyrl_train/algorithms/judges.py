"""The judges of ``properties.py``: each calls a function with a case and says what is wrong with it, or None."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import isclose, isnan
from typing import Any

import torch
from torch import Tensor

from skyrl_train.algorithms.cases import LEARNED, Case, Outcome, Subject, tensor_of
from skyrl_train.algorithms.losses import merge_metrics
from skyrl_train.algorithms.table import accepts, resolve

Judge = Callable[[Subject, Case], "str | None"]

BAD = (float("nan"), float("inf"), float("-inf"))


def can_be_called(subject: Subject, case: Case) -> str | None:
    subject.run(case)  # what is wrong, it raises
    return None


def masked(subject: Subject, case: Case) -> str | None:
    want = subject.run(case)
    for bad in BAD:
        dirty = {n: torch.where(case["mask"], v, bad) if n != "mask" and v.dim() == 2 else v for n, v in case.items()}
        if wrong := _differ(subject.run(dirty), want):
            return f"with {bad} there, {wrong}. Choose with torch.where; a product with the mask lets it through."
    return None


def untouched(subject: Subject, case: Case) -> str | None:
    given = {name: value.clone() for name, value in case.items()}
    subject.call(given)
    changed = [name for name, value in given.items() if not torch.equal(value, case[name])]
    return f"{', '.join(changed)} changed in place" if changed else None


def order(subject: Subject, case: Case) -> str | None:
    if accepts(resolve(subject.family, subject.name), "micro_batch_size"):
        return None  # by its definition it depends on which rows are together
    rows = torch.randperm(len(case["group"]), generator=torch.Generator().manual_seed(1))
    want, got = subject.run(case), subject.run({name: value[rows] for name, value in case.items()})
    return _differ(got, _part(want, rows))


def padding(subject: Subject, case: Case) -> str | None:
    want, width = subject.run(case), case["mask"].shape[1]
    pad = torch.nn.functional.pad
    wider = {name: pad(value, (0, 3), value=False) if value.dim() == 2 else value for name, value in case.items()}
    return _differ(_part(subject.run(wider), (slice(None), slice(width))), want)


def small(subject: Subject, case: Case) -> str | None:
    for rows, width, kept in ((1, 1, True), (2, 3, False), (0, 3, True)):
        part = {name: v[:rows, :width] if v.dim() == 2 else v[:rows] for name, v in case.items()}
        part["mask"] = torch.full((rows, width), kept)
        found = subject.run(part)
        numbers = [found.tensor, *([] if found.gradient is None else [found.gradient])]
        unknown = rows and any(isnan(v) for v in found.metrics.values())
        if unknown or not all(t.isfinite().all() for t in numbers):
            return f"of {rows} x {width} tokens, {'all' if kept else 'none'} in the mask, it makes what is not finite"
    return None


def rows_apart(subject: Subject, case: Case) -> str | None:
    told = subject.chosen(case)
    want = subject.run(case, **told)
    parts: list[Outcome] = []
    micro = torch.arange(len(case["group"])).split(2)
    for rows in micro:
        parts.append(subject.run({n: v[rows] for n, v in case.items()}, **{n: v[rows] for n, v in told.items()}))
        if wrong := _differ(replace(parts[-1], metrics={}), replace(_part(want, rows), metrics={})):
            return f"{wrong}. What needs the whole mini-batch is chosen before (losses_covariance.whole_batch)."
    merged = merge_metrics([p.metrics for p in parts], [float(case["mask"][rows].sum()) for rows in micro])
    if wrong := _differ(replace(want, metrics=merged), want):
        return f"{wrong}. A metric is a mean over the True positions, or ends in _max or _min."
    return None


def flow(subject: Subject, case: Case) -> str | None:
    learned = LEARNED[subject.family]
    return None if learned in _moved(subject, case) else f"{learned} gets none, so nothing would be learned"


def flow_elsewhere(subject: Subject, case: Case) -> str | None:
    others = ", ".join(sorted(_moved(subject, case) - {LEARNED[subject.family]}))
    return f"{others} too; a run gives it without gradient, so nothing comes of it" if others else None


def _moved(subject: Subject, case: Case) -> set[str]:
    """The tensors that a gradient flows to."""
    live = {n: v.clone().requires_grad_() if v.is_floating_point() else v for n, v in case.items()}
    total = tensor_of(subject.call(live)).sum()
    if total.requires_grad:
        total.backward()
    return {n for n, v in live.items() if v.grad is not None and v.grad.any()}


def finite_differences(subject: Subject, case: Case) -> str | None:
    learned, told = LEARNED[subject.family], subject.chosen(case)
    x = case[learned].clone().requires_grad_()

    def value(given: Tensor) -> Tensor:
        return tensor_of(subject.call(case | {learned: given}, **told))

    exact = torch.autograd.gradcheck(value, (x,), raise_exception=False)
    return None if exact else "it is not, as with a part held still on purpose, or beside the bound of a clip"


def equal_rewards(subject: Subject, case: Case) -> str | None:
    pairs = torch.arange(len(case["group"])) // 2
    case = case | {"mask": torch.ones_like(case["mask"]), "rewards": torch.zeros_like(case["rewards"]), "group": pairs}
    case["rewards"][:, -1] = 0.1
    case |= {"values": torch.full_like(case["values"], 0.1), "baseline": torch.full_like(case["baseline"], 0.1)}
    largest = subject.run(case).tensor.abs().max().item()
    return f"all rewards are 0.1, and the largest advantage is {largest:.3g}" if largest > 1e-6 else None


def not_negative(subject: Subject, case: Case) -> str | None:
    negative = (subject.run(case).tensor < 0).any()
    return "some are: a token of negative weight is pushed the other way" if negative else None


def _part(outcome: Outcome, index: Any) -> Outcome:
    """Some rows or columns of the tensors."""
    gradient = None if outcome.gradient is None else outcome.gradient[index]
    return replace(outcome, tensor=outcome.tensor[index], gradient=gradient)


def _differ(got: Outcome, want: Outcome) -> str | None:
    """Which part of two outcomes is not the same but for rounding."""
    for name in ("tensor", "gradient"):
        a, b = getattr(got, name), getattr(want, name)
        if a is not None and not torch.allclose(a, b, rtol=1e-6, atol=1e-9):
            gap = (a - b).abs().max().item()
            return f"the {'result' if name == 'tensor' else name} is another one (by up to {gap:.3g})"
    if got.metrics.keys() != want.metrics.keys():
        return "the metrics have other names"
    for name, value in got.metrics.items():
        if not isclose(value, want.metrics[name], rel_tol=1e-6, abs_tol=1e-9):
            return f"the metric {name} is {value:.6g} instead of {want.metrics[name]:.6g}"
    return None
