"""Reading torch.distributed.checkpoint's format from anywhere: of its pickles, torch's own records alone are made."""

import io
import math
import pathlib
import pickle
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

from tim.typed_yaml import first_line

SHARDED = ".metadata"  # the file by which a sharded checkpoint is known
RECORDS: dict[str, Any] = {
    **{f"{metadata.__name__}.{name}": getattr(metadata, name) for name in (*metadata.__all__, "_MEM_FORMAT_ENCODING")},
    f"{filesystem.__name__}._StorageInfo": filesystem._StorageInfo,
    "torch.Size": torch.Size,
    "torch.serialization._get_layout": torch.serialization._get_layout,
    **{f"{module}.PosixPath": pathlib.PurePosixPath for module in ("pathlib", "pathlib._local")},
    **{str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)},
}


class _Unpickler(pickle._Unpickler):  # the one in C makes room for as many objects as a file claims to number
    """Makes nothing but RECORDS."""

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" not in RECORDS:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is not loaded")
        return RECORDS[f"{module}.{name}"]


class _Reader(dcp.FileSystemReader):
    """Reads what `read_metadata` found sound."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> metadata.Metadata:
        found = read_metadata(Path(self.path))
        found.storage_meta = metadata.StorageMeta(load_id=self.load_id)
        return found


class _Planner(DefaultLoadPlanner):
    """Takes tensors and plain values: torch would unpickle anything that is no tensor."""

    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        plain = io.BytesIO()
        torch.save(torch.load(value, map_location="cpu", weights_only=True), plain)
        plain.seek(0)
        super().load_bytes(read_item, plain)


def read_metadata(folder: Path) -> metadata.Metadata:
    """What a sharded checkpoint says of its tensors and files.

    Raises:
        ValueError: when it is damaged, names a class that is none of torch's records, a file that is not in the folder, or
            tensors larger than the files.
    """
    path = folder / SHARDED
    try:
        with open(path, "rb") as f:
            found = _Unpickler(f).load()
        _check(found, {p.name: p.stat().st_size for p in folder.iterdir() if p.is_file()})
    except Exception as error:  # of a pickle: anything
        raise ValueError(f"{path} is no index of a sharded checkpoint: {first_line(error)}") from error
    return found


def _check(found: metadata.Metadata, sizes: dict[str, int]) -> None:
    """Raise unless every entry lies within the files, whose sizes in bytes are given by name."""
    for stored in found.storage_data.values():
        if not 0 <= stored.offset <= stored.offset + stored.length <= sizes.get(stored.relative_path, -1):
            raise ValueError(f"there is no {stored.relative_path} with {stored.offset + stored.length} bytes")
    total = 0
    for name, entry in found.state_dict_metadata.items():
        if not isinstance(name, str) or not isinstance(entry, metadata.TensorStorageMetadata | metadata.BytesStorageMetadata):
            raise ValueError(f"{name!r} is no tensor")
        if isinstance(entry, metadata.TensorStorageMetadata):
            total += math.prod(entry.size) * entry.properties.dtype.itemsize
            if min(entry.size, default=0) < 0 or total > sum(sizes.values()):
                raise ValueError(f"{name} of shape {tuple(entry.size)} has no room in {sum(sizes.values())} bytes")


def load(parts: dict[str, Any], folder: Path, group: dist.ProcessGroup | None = None) -> None:
    """Read a sharded checkpoint into state dicts, tensors in place. Collective over `group`.

    Raises:
        ValueError: when it is damaged, holds anything but tensors and plain values, or lacks some of the parts.
    """
    try:
        dcp.load(parts, storage_reader=_Reader(folder), planner=_Planner(), process_group=group)
    except CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        raise ValueError(f"{folder} cannot be read (rank {rank}): {first_line(cause)}") from error
