"""``gsm8k`` and ``numeric``: word problems whose answer is one number."""

from __future__ import annotations

import re
from typing import Any

from skyrl_train.envs.answers import canonical, numbers
from skyrl_train.envs.base import Env, StepResult
from skyrl_train.envs.facts import bad_truth, finish, read_settings, text_truth
from skyrl_train.types import Prompt

_GOES_ON = re.compile(r"\s*[/^*]\s*\S|[eE][+-]?[0-9]")
"""After the number: it was a part of an expression, and 1/2 is not 1."""


class Gsm8kEnv(Env):
    """1 if the answer is the ground truth as a number, else 0. Commas, ``$``, minus signs and decimals may be written.

    Settings: ``method``. ``strict`` reads the number behind the last ``####``; ``flexible`` the last number of the
    response, wherever it stands.
    """

    section = "gsm8k"
    methods = ("strict", "flexible")

    def __init__(self, prompt: Prompt, settings: dict[str, Any]) -> None:
        super().__init__(prompt, settings)
        self.method = read_settings(self.section, settings, method=self.methods).method
        truth = text_truth(prompt)
        answer = canonical(truth.rpartition("####")[2])  # the published form is a worked answer
        if answer is None:
            raise bad_truth(prompt, truth, "a number")
        self.answer = answer

    def step(self, response: str) -> StepResult:
        found = strict_number(response) if self.method == "strict" else flexible_number(response)
        return finish(found == self.answer, answered=found is not None)


class NumericEnv(Gsm8kEnv):
    """``numeric``: the same with ``method=flexible`` as the default."""

    section = "numeric"
    methods = ("flexible", "strict")


def strict_number(response: str) -> str | None:
    """The number behind the last ``####``, in canonical form."""
    _, mark, rest = response.rpartition("####")
    line = rest.lstrip().partition("\n")[0]
    match = re.match(r"[-\u2212$ ]*+(?:[0-9][0-9,]*+)?+(?:\.[0-9]++)?+", line)
    if not mark or match is None or _GOES_ON.match(line, match.end()):
        return None
    return canonical(match[0])


def flexible_number(response: str) -> str | None:
    """The last number of the response, in canonical form."""
    # The end is enough, and a search over half a megabyte for each response is not free. A cut number is not the last
    # one unless it is over 2,000 digits long.
    last = None
    for last in numbers(response[-2000:]):  # noqa: B007 - the last one is wanted
        pass
    return last
