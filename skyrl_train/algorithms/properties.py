"""What every function of a family keeps, tried on random cases: for users' own functions, and for ours.

    skyrl check policy_loss my_pkg.losses:mine                 one line for each property
    assert broken("policy_loss", "my_pkg.losses:mine") == []   the same in a test

A property that is broken makes numbers depend on what must not matter: padding, the order of rows, the micro-batch. A
note says what is unusual and may be meant.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from skyrl_train.algorithms import judges
from skyrl_train.algorithms.cases import LEARNED, Case, Subject, random_case
from skyrl_train.algorithms.judges import Judge
from skyrl_train.config.algorithm import AlgorithmConfig
from skyrl_train.errors import ConfigError

CASES = 4

Verdict = Literal["holds", "broken", "note"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One property of a function."""

    property: str
    verdict: Verdict
    detail: str = ""


def check(family: str, name: str, config: AlgorithmConfig | None = None) -> list[Finding]:
    """Tries the contract of a family on a function.

    Args:
        family: a key of ``table.FAMILIES``.
        name: a name of the family's table, or ``package.module:function``.
        config: the section ``trainer.algorithm`` that the function gets; None: the defaults.

    Returns:
        One finding for each property; only the first, broken, if the function cannot be called at all.
    """
    subject = Subject(family, name, config or AlgorithmConfig(max_seq_len=8))
    first = "signature and result"
    detail = _tried(judges.can_be_called, subject, random_case(0))
    found = [Finding(property=first, verdict="broken" if detail else "holds", detail=detail or "")]
    for title, judge, verdict in [] if detail else _properties(family):
        details = filter(None, (_tried(judge, subject, random_case(seed)) for seed in range(CASES)))
        detail = next(details, None)
        found.append(Finding(property=title, verdict=verdict if detail else "holds", detail=detail or ""))
    return found


def broken(family: str, name: str, config: AlgorithmConfig | None = None) -> list[str]:
    """The properties that do not hold, each with what was seen. Arguments as ``check``."""
    return [f"{f.property}: {f.detail}" for f in check(family, name, config) if f.verdict == "broken"]


def _tried(judge: Judge, subject: Subject, case: Case) -> str | None:
    try:
        return judge(subject, case)
    except ConfigError as error:  # says by itself whose function did what
        return str(error)
    except Exception as error:  # a function of a user's own may raise anything
        return f"it raises {type(error).__name__}: {error}"


Property = tuple[str, Judge, Verdict]
"""Title, judge, and what it means if the judge objects."""


def _properties(family: str) -> list[Property]:
    properties: list[Property] = [
        ("nan and inf outside the mask change nothing", judges.masked, "broken"),
        ("its arguments stay as they were", judges.untouched, "broken"),
        ("the order of rows changes nothing", judges.order, "broken"),
        ("more padding changes nothing", judges.padding, "broken"),
        ("a batch of one token, of none, of no row", judges.small, "broken"),
    ]
    if family in LEARNED:
        learning: list[Property] = [
            ("rows may be cut into micro-batches", judges.rows_apart, "broken"),
            (f"a gradient flows to {LEARNED[family]}", judges.flow, "broken"),
            ("no gradient flows elsewhere", judges.flow_elsewhere, "note"),
            ("the gradient is that of the value", judges.finite_differences, "note"),
        ]
        properties += learning
    if family == "advantage_estimator":
        properties.append(("groups of equal rewards teach nothing", judges.equal_rewards, "note"))
    if family == "loss_reduction":
        properties.append(("weights are not negative", judges.not_negative, "note"))
    return properties
