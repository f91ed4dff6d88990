"""Tensors in files, each worker its shards: torch's distributed checkpoint (DCP).

A folder, or an address that fsspec knows, holds ``__<rank>_<n>.distcp`` and ``.metadata``, which says where each piece
of each tensor lies. So any number of workers can read what any other number has written. ``.metadata`` is a pickle;
here it may name the classes of DCP alone, and no code of a stranger's runs when it is read.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader, FsspecWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from skyrl_train.storage.paths import is_remote

warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # it says that one worker is one worker

METADATA = ".metadata"
_MODULES = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
_NAMES = {
    ("torch", "Size"), ("torch.serialization", "_get_layout"), ("collections", "OrderedDict"), ("builtins", "set"),
    ("torch._utils", "_rebuild_device"), ("torch", "device"), ("pathlib", "PosixPath"), ("pathlib", "Path"),
}  # fmt: skip
_DTYPES = frozenset({
    "float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool",
    "contiguous_format", "preserve_format", "channels_last", "strided",
})  # fmt: skip


def write(folder: str, tensors: Mapping[str, Tensor], *, group: Any = None, alone: bool) -> None:
    """Writes the tensors; those that are DTensors by every worker's shard. A collective, unless ``alone``.

    Args:
        group: the process group of the collective; None: the default one.
        alone: there is one worker.

    Raises:
        OSError: one of the workers could not write, or wrote where the others do not see it; or there is a checkpoint.
    """
    remote = is_remote(folder)
    kind = FsspecWriter if remote else FileSystemWriter
    writer = kind(folder, single_file_per_rank=True, sync_files=not remote, overwrite=False)
    with _plain(folder):
        save(dict(tensors), storage_writer=writer, process_group=group, no_dist=alone)
    _require_seen(_reader(folder), folder)


def _require_seen(reader: FileSystemReader, folder: str) -> None:
    """Raises OSError if what the others wrote is not here: better now than at a resume."""

    def seen(name: str) -> bool:
        return reader.fs.exists(reader.fs.concat_path(reader.path, name))

    storage = reader.read_metadata().storage_data if seen(METADATA) else {}
    absent = sorted(name for name in {METADATA} | {info.relative_path for info in storage.values()} if not seen(name))
    if absent:
        raise FileNotFoundError(
            f"{folder}/{absent[0]} was written and cannot be seen from here. Workers on several nodes need a folder "
            "that all of them share"
        )


def read(folder: str, tensors: Mapping[str, Tensor], *, group: Any = None, alone: bool) -> None:
    """Fills the given tensors, in place, with those of the same names in the folder. A collective, unless ``alone``.

    Raises:
        OSError: one of the workers cannot read what it needs.
    """
    with _plain(folder):
        load(dict(tensors), storage_reader=_reader(folder), process_group=group, no_dist=alone)


def sizes(folder: str) -> dict[str, tuple[int, ...]]:
    """The whole shape of each tensor in the folder.

    Raises:
        FileNotFoundError: there is no ``.metadata``.
        UnpicklingError: it is broken, or names what DCP would not.
    """
    held = _reader(folder).read_metadata().state_dict_metadata
    return {name: tuple(about.size) for name, about in held.items() if isinstance(about, TensorStorageMetadata)}


@contextmanager
def _plain(folder: str) -> Iterator[None]:
    """What DCP collects of all workers, which is no Exception, becomes one."""
    try:
        yield
    except CheckpointException as error:
        rank, (cause, _) = min(error.failures.items(), key=lambda item: item[0])
        raise OSError(f"rank {rank}, {folder}: {type(cause).__name__}: {cause}") from cause


def _reader(folder: str) -> FileSystemReader:
    return _RemoteReader(folder) if is_remote(folder) else _LocalReader(folder)


class _Careful:
    """Reads ``.metadata`` without letting it name whatever it likes."""

    fs: Any
    path: Any
    load_id: str

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with self.fs.create_stream(self.fs.concat_path(self.path, METADATA), "rb") as file:
            metadata = _Unpickler(file).load()
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError(f"it is a {type(metadata).__name__}")
        if getattr(metadata, "storage_meta", None) is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id  # pyright: ignore[reportOptionalMemberAccess]
        return metadata


class _LocalReader(_Careful, FileSystemReader):
    pass


class _RemoteReader(_Careful, FsspecReader):
    pass


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _NAMES or (module == "torch" and name in _DTYPES):
            return super().find_class(module, name)
        if module in _MODULES and "." not in name:  # a dot would lead on, to what those modules import
            found = super().find_class(module, name)
            if isinstance(found, type) and found.__module__ == module:
                return found
        raise pickle.UnpicklingError(f"it names {module}.{name}")
