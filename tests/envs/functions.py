"""Functions that the tests of killable run in helper processes."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from typing import Any


def act(what: str, value: Any = None) -> Any:
    """Does what it is told."""
    if what == "echo":
        return value
    if what == "pid":
        return os.getpid()
    if what == "modules":
        return [name for name in ("torch", "transformers", "numpy", "ray") if name in sys.modules]
    if what == "raise":
        raise ValueError("on purpose")
    if what == "exit":
        raise SystemExit(3)
    if what == "die":
        os.kill(os.getpid(), signal.SIGSEGV)
    if what == "sleep":
        time.sleep(value)
    if what == "hold the lock":
        re.match(r"(a|a)*b", "a" * 60)  # exponential, and no other thread runs meanwhile
    if what == "power":
        return len(str(9 ** (9**9)))
    if what == "memory":
        return len(bytearray(value))
    if what == "print":
        print("noise " * 1000)
        return "said"
    if what == "a set":
        return {1}
    return None
