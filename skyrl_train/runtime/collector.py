"""Python's garbage collector, kept off what a run has built up."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

THRESHOLD = 20_000
"""New objects between two collections. One answer with its log-probs is as many as a thousand."""


@contextmanager
def settled() -> Iterator[None]:
    """While inside, collections pass over all that exists at the beginning: models, tokenizers, libraries.

    They would go through those half a million objects again and again while answers of engines are read, which took a
    third of that time.
    """
    before = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(max(THRESHOLD, before[0]), *(max(20, each) for each in before[1:]))
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()
