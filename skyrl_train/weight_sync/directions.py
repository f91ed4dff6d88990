"""What the loader inside an SGLang server is told of a bucket: see ``engines/sglang/inside/skyrl_loader.py``."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

from skyrl_train.engines.sglang.payloads import Bucket, aligned
from skyrl_train.weight_sync.layout import Piece


def directions(
    bucket: Bucket, pieces: Mapping[str, Piece], totals: Mapping[str, int], *, tied: bool, hold: bool = False
) -> bytes:
    """What ``inside/skyrl_loader.py`` reads: the bucket's tensors, and where one rank holds them.

    Compressed: it travels with every bucket, and the server looks at what comes letter by letter.

    Args:
        pieces, totals: as ``Layout.pieces`` returns them.
        tied: the output embedding is the input's.
        hold: the memory is to stay mapped.
    """
    tensors, found, start = [], [], 0
    for index, spec in enumerate(bucket):
        tensors.append((spec.name, str(spec.dtype).removeprefix("torch."), spec.shape, start))
        piece = pieces[spec.name]
        found.append((index, piece.held, piece.first, piece.size, piece.stride, piece.start, piece.zeros))
        start += aligned(spec.size)
    held = {piece[1]: totals[piece[1]] for piece in found}
    return _message({"tensors": tensors, "pieces": found, "held": held, "tied": tied, "hold": hold})


def question(names: Iterable[str], *, hold: bool = False) -> bytes:
    """What asks the loader for digests of all that one rank holds, in the order of these names.

    Args:
        hold: the memory of the answer is to stay mapped.
    """
    return _message({"report": list(names), "hold": hold})


def _message(told: Mapping[str, Any]) -> bytes:
    return zlib.compress(json.dumps(told, separators=(",", ":")).encode())
