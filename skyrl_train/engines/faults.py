"""How an engine that is a server can fail a request. What may be done next differs, so the kinds do.

EngineError
├── EngineRefusedError     the request is at fault: every engine would refuse it
└── EngineLostError        the engine is: unreachable, broken off, or out of order
"""

from __future__ import annotations

from skyrl_train.engines.base import Completion
from skyrl_train.errors import EngineError


class EngineRefusedError(EngineError):
    """The server answered that it will not serve this request (4xx). Nothing was sampled."""


class EngineLostError(EngineError):
    """The engine did not finish a request.

    Args:
        message: names the address, the path and the cause.
        partial: what is known to have been sampled: an empty completion if the request certainly never ran, None if
            that cannot be known. Only in the first two cases may the request go on elsewhere.
    """

    def __init__(self, message: str, partial: Completion | None = None) -> None:
        self.partial = partial
        super().__init__(message)

    def __reduce__(self):  # Exception pickles by args
        return type(self), (str(self), self.partial)
