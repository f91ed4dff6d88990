"""Tensors as SGLang reads them from another process: the memory is shared, the message holds its handle.

The format is that of Python's multiprocessing with torch's reductions, and SGLang lets only known modules through. So
nothing of SGLang has to be imported to write it: a bucket's metadata are plain namespaces with the same fields.
"""

from __future__ import annotations

import base64
import io
import mmap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """One tensor as it travels."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size(self) -> int:
        """Bytes."""
        count = 1
        for n in self.shape:
            count *= n
        return count * self.dtype.itemsize


Bucket = tuple[Spec, ...]


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
    views, start = [], 0
    for spec in bucket:
        views.append(flat[start : start + spec.size].view(spec.dtype).view(spec.shape))
        start += aligned(spec.size)
    return views


def bucket_payloads(bucket: Bucket, flat: Tensor, ranks: int, readers: int = 1) -> tuple[list[str], list[Tensor]]:
    """Payloads of one bucket for ``load_format="flattened_bucket"``.

    Args:
        ranks: how many payloads; each is for one tensor-parallel rank of one engine.
        readers: how many processes read each (pipeline-parallel stages read the same).

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
    return [serialize({"flattened_tensor": copy, "metadata": metadata}, readers) for copy in copies], copies


def directed_payloads(directions: Sequence[str], flat: Tensor) -> tuple[list[str], list[Tensor]]:
    """Payloads of one bucket for ``load_format=LOADER``, one for each rank.

    Args:
        directions: the message of each rank (``weight_sync/directions.py``).

    Returns:
        As ``bucket_payloads``.
    """
    copies = _for_ranks(flat, len(directions))
    return [serialize([(text, copy)]) for text, copy in zip(directions, copies, strict=True)], copies


def _for_ranks(flat: Tensor, ranks: int) -> list[Tensor]:
    """Memory for each rank to open: on a CPU, each needs its own."""
    return [flat if flat.is_cuda or rank == 0 else flat.clone() for rank in range(ranks)]


def adapter_payloads(tensors: Mapping[str, Tensor], ranks: int) -> tuple[list[str], list[dict[str, Tensor]]]:
    """Payloads of an adapter's tensors, one for each rank, and the tensors behind them."""
    copies = [{name: tensor.detach().clone() for name, tensor in tensors.items()} for _ in range(ranks)]
    return [serialize(copy) for copy in copies], copies


def serialize(value: Any, readers: int = 1) -> str:
    """Base64 of a pickle that holds handles of shared memory in place of tensors' data."""
    buffer = io.BytesIO()
    with _shared_by_file():
        _Pickler(buffer, readers).dump(value)
    return base64.b64encode(buffer.getvalue()).decode()


class _Pickler(ForkingPickler):
    """Names a GPU by its UUID, since the reader may number them otherwise, and counts every reader.

    torch counts one reader for each message and lets the memory go when that one is done.
    """

    def __init__(self, file: io.BytesIO, readers: int) -> None:
        super().__init__(file)
        self._readers = readers

    def reducer_override(self, obj: Any) -> Any:
        import torch
        from torch.multiprocessing import reductions

        if type(obj) is not torch.Tensor:
            return NotImplemented
        function, found = reductions.reduce_tensor(obj)
        args: Any = found
        if function is reductions.rebuild_cuda_tensor:
            uuid = str(torch.cuda.get_device_properties(args[_DEVICE]).uuid)
            _count_readers(args[_COUNTER], args[_COUNTER_PLACE], self._readers - 1)
            return function, (*args[:_DEVICE], uuid, *args[_DEVICE + 1 :])
        if self._readers > 1:
            storage = obj.untyped_storage().share_memory_()
            for _ in range(self._readers - 1):
                storage._shared_incref()
        return function, args


def _count_readers(handle: bytes, place: int, more: int) -> None:
    """Adds to the counter, in a file of shared memory, that says how many still read a block of GPU memory."""
    if more:
        path = Path("/dev/shm") / handle.decode().lstrip("/")
        with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
            at = slice(place * 8, place * 8 + 8)
            memory[at] = (int.from_bytes(memory[at], "little", signed=True) + more).to_bytes(8, "little", signed=True)


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
