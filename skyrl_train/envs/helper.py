"""The other side of ``killable``: what runs in a helper process. Imports the standard library alone."""

from __future__ import annotations

import importlib
import json
import os
import resource
import sys
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any


def main(pipe_number: int, function: str, memory: int) -> None:
    """Answers calls until the pipe ends."""
    pipe = Connection(pipe_number)
    os.dup2(2, 1)  # what the function prints goes to the log, not between the run's lines
    with suppress(ValueError, OSError):  # not every system has this limit
        resource.setrlimit(resource.RLIMIT_AS, (memory, resource.getrlimit(resource.RLIMIT_AS)[1]))
    try:
        module, _, name = function.partition(":")
        call = getattr(importlib.import_module(module), name)
    except BaseException as error:
        _answer(pipe, error=f"cannot be imported: {_text(error)}")
        return
    _answer(pipe, result=None)
    while True:
        try:
            request = json.loads(pipe.recv_bytes())
        except EOFError:
            return
        _limit_cpu(request["timeout"])
        try:
            answer = {"result": call(*request["args"])}
        except BaseException as error:
            answer = {"error": _text(error)}
        _answer(pipe, **answer)


def _limit_cpu(timeout: float) -> None:
    """Lets the kernel end this process if the run that should have killed it is gone."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    seconds = int(used.ru_utime + used.ru_stime + timeout) + 10
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, resource.getrlimit(resource.RLIMIT_CPU)[1]))


def _answer(pipe: Connection, **answer: Any) -> None:
    try:
        data = json.dumps(answer).encode()
    except (TypeError, ValueError, RecursionError) as error:
        data = json.dumps({"error": f"its result cannot be sent: {_text(error)}"}).encode()
    try:
        pipe.send_bytes(data)
    except OSError:  # nobody is waiting any more
        sys.exit(0)


def _text(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {str(error)[:500]}"
    except Exception:  # a __str__ that raises
        return type(error).__name__
