"""Tensors as SGLang reads them from another process: the memory is shared, the message holds its handle.

The format is that of Python's multiprocessing with torch's reductions, and SGLang lets only known modules through. So
nothing of SGLang has to be imported to write it: a bucket's metadata are plain namespaces with the same fields.
"""

from __future__ import annotations

import base64
import io
import math
import mmap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

GB = 1 << 30
LOADER = "skyrl_loader.load"
"""Our own way in: ``inside/skyrl_loader.py``, where the server has it."""
ALIGNMENT = 16
"""Bytes: where a tensor may start in a bucket, so that it can be read as its own type."""
_DEVICE, _COUNTER, _COUNTER_PLACE = 6, 11, 12
"""Places in what torch's ``reduce_tensor`` returns for a tensor on a GPU."""
_HEADER = 64
"""Bytes before the first counter of a file: torch keeps there how many have opened the file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """One tensor as it travels."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


Bucket = tuple[Spec, ...]


@dataclass(frozen=True, slots=True)
class Counter:
    """Says how many processes have still to read a block of GPU memory; torch keeps it in a file of shared memory."""

    file: Path
    place: int

    def change(self, more: int | None) -> int:
        """Adds ``more``, or makes it zero (None). Returns what it was."""
        with self.file.open("r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
            first = _HEADER + self.place * 8
            at = slice(first, first + 8)
            before = int.from_bytes(memory[at], "little", signed=True)
            memory[at] = (0 if more is None else before + more).to_bytes(8, "little", signed=True)
        return before


def give_up(counters: Iterable[Counter]) -> int:
    """Takes back what was shared with processes that ended before they read it; else it would never be freed.

    torch uses no place twice, so that one who reads late does no harm to other memory.

    Returns:
        How many messages were not read.
    """
    unread = 0
    for counter in counters:
        with suppress(FileNotFoundError):  # all of that file's blocks have been read
            unread += counter.change(None) > 0
    return unread


def plan_buckets(specs: Iterable[Spec], limit: int = GB) -> list[Bucket]:
    """Specs, in order, in buckets of at most ``limit`` bytes; a larger tensor stands alone."""
    buckets: list[list[Spec]] = []
    used = 0
    for spec in specs:
        size = aligned(spec.size)
        if not buckets or used + size > limit:
            buckets.append([])
            used = 0
        buckets[-1].append(spec)
        used += size
    return [tuple(bucket) for bucket in buckets]


def empty_bucket(bucket: Bucket, device: torch.device | str) -> tuple[Tensor, list[Tensor]]:
    """One run of bytes for the tensors, converted to their specs' types.

    Returns:
        The bytes, ``[N]`` uint8 on ``device``, and the tensors in it as views, to be filled.
    """
    import torch

    flat = torch.empty(sum(aligned(spec.size) for spec in bucket), dtype=torch.uint8, device=device)
    return flat, unpack(bucket, flat)


def pack(bucket: Bucket, tensors: Sequence[Tensor], device: torch.device | str) -> tuple[Tensor, list[Tensor]]:
    """``empty_bucket``, filled with whole tensors in one pass."""
    import torch

    flat, views = empty_bucket(bucket, device)
    with torch.no_grad():
        torch._foreach_copy_(views, [t.detach() for t in tensors])  # pyright: ignore[reportPrivateImportUsage]
    return flat, views


def unpack(bucket: Bucket, flat: Tensor) -> list[Tensor]:
    """The bucket's tensors as views of its bytes."""
    typed = {dtype: flat.view(dtype) for dtype in {spec.dtype for spec in bucket}}
    views, start = [], 0
    for spec in bucket:
        views.append(typed[spec.dtype].as_strided(spec.shape, _strides(spec.shape), start // spec.dtype.itemsize))
        start += aligned(spec.size)
    return views


@cache
def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[place + 1 :]) for place in range(len(shape)))


def bucket_payloads(
    bucket: Bucket, flat: Tensor, ranks: int, readers: int = 1, counters: list[Counter] | None = None
) -> tuple[list[str], list[Tensor]]:
    """Payloads of one bucket for ``load_format="flattened_bucket"``.

    Args:
        ranks: how many payloads; each is for one tensor-parallel rank of one engine.
        readers: how many processes read each (pipeline-parallel stages read the same).
        counters: gets those of GPU memory, for ``give_up``.

    Returns:
        The payloads, and the tensors behind them, which must live until the server has answered.
    """
    metadata, start = [], 0
    for spec in bucket:
        end = start + spec.size
        metadata.append(
            SimpleNamespace(
                name=spec.name, shape=spec.shape, dtype=spec.dtype, start_idx=start, end_idx=end, numel=spec.size
            )
        )
        start += aligned(spec.size)
    copies = _for_ranks(flat, ranks)
    return [serialize({"flattened_tensor": copy, "metadata": metadata}, readers, counters) for copy in copies], copies


def directed_payloads(
    directions: Sequence[Sequence[bytes]],
    flats: Sequence[Tensor],
    counters: list[Counter] | None = None,
    questions: Sequence[tuple[bytes, Tensor]] = (),
) -> tuple[list[str], list[Tensor]]:
    """Payloads of one bucket for ``load_format=LOADER``, one for each rank.

    Args:
        directions: for each rank the message (``weight_sync/directions.py``) of each run of the bucket's bytes.
        flats: the runs.
        counters: as for ``bucket_payloads``.
        questions: for each rank what it is asked when it has loaded them, and the memory for its answer.

    Returns:
        As ``bucket_payloads``.
    """
    copies = list(zip(*(_for_ranks(flat, len(directions)) for flat in flats), strict=True))
    payloads = [
        serialize([*zip(texts, own, strict=True), *questions[rank : rank + 1]], 1, counters)
        for rank, (texts, own) in enumerate(zip(directions, copies, strict=True))
    ]
    return payloads, [copy for own in copies for copy in own]


def _for_ranks(flat: Tensor, ranks: int) -> list[Tensor]:
    """Memory for each rank to open: on a CPU, each needs its own."""
    return [flat if flat.is_cuda or rank == 0 else flat.clone() for rank in range(ranks)]


def adapter_payloads(tensors: Mapping[str, Tensor], ranks: int) -> tuple[list[str], list[dict[str, Tensor]]]:
    """Payloads of an adapter's tensors, one for each rank, and the tensors behind them."""
    copies = [{name: tensor.detach().clone() for name, tensor in tensors.items()} for _ in range(ranks)]
    return [serialize(copy) for copy in copies], copies


def serialize(value: Any, readers: int = 1, counters: list[Counter] | None = None) -> str:
    """Base64 of a pickle that holds handles of shared memory in place of tensors' data."""
    buffer = io.BytesIO()
    with _shared_by_file():
        _Pickler(buffer, readers, [] if counters is None else counters).dump(value)
    return base64.b64encode(buffer.getvalue()).decode()


class _Pickler(ForkingPickler):
    """Names a GPU by its UUID, since the reader may number them otherwise, and counts every reader.

    torch counts one reader for each message and lets the memory go when that one is done.
    """

    def __init__(self, file: io.BytesIO, readers: int, counters: list[Counter]) -> None:
        super().__init__(file)
        self._readers, self._counters = readers, counters

    def reducer_override(self, obj: Any) -> Any:
        import torch
        from torch.multiprocessing import reductions

        if type(obj) is not torch.Tensor:
            return NotImplemented
        function, found = reductions.reduce_tensor(obj)
        args: Any = found
        if function is reductions.rebuild_cuda_tensor:
            uuid = str(torch.cuda.get_device_properties(args[_DEVICE]).uuid)
            self._counters.append(Counter(Path("/dev/shm") / args[_COUNTER].decode().lstrip("/"), args[_COUNTER_PLACE]))
            if self._readers > 1:
                self._counters[-1].change(self._readers - 1)
            return function, (*args[:_DEVICE], uuid, *args[_DEVICE + 1 :])
        if self._readers > 1:
            storage = obj.untyped_storage().share_memory_()
            for _ in range(self._readers - 1):
                storage._shared_incref()
        return function, args


def aligned(size: int) -> int:
    """The bytes that a tensor of ``size`` bytes takes in a bucket."""
    return -(-size // ALIGNMENT) * ALIGNMENT


@contextmanager
def _shared_by_file() -> Iterator[None]:
    """CPU memory shared by name: file descriptors could be passed to our own children only."""
    from torch import multiprocessing

    before = multiprocessing.get_sharing_strategy()
    multiprocessing.set_sharing_strategy("file_system")
    try:
        yield
    finally:
        multiprocessing.set_sharing_strategy(before)
