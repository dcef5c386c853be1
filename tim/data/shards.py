"""Tar shards: many samples in few files, each read by its place.

The members of a shard that differ in their last suffix alone are one sample: `<class>/<name>.safetensors` (a latent file),
`<class>/<name>.jpg` or another image, `<class>/<name>.cls` (the label as text). Other and hidden members are ignored. Where
each member lies is looked up once per shard and kept in `<shard>.index.npz`, so samples are numbered as in a folder and read
in any order.
"""

import contextlib
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch.distributed as dist
from tqdm import tqdm

from tim.files import replacing
from tim.images import IMAGE_SUFFIXES
from tim.listing import check_plain, fit_name, is_data, list_files

VERSION = 2  # of the index files
BLOCK = 512  # bytes; tar pads everything to this
MAX_OPEN = 64  # shards a process keeps open
MAX_MEMBER = 1 << 30  # bytes; no image, latent or text is larger
LABEL = re.compile(rb"\s*[0-9]{1,9}\s*")
KINDS = ("latent", "image")
KIND_OF = {".safetensors": "latent", ".cls": "label", **dict.fromkeys(IMAGE_SUFFIXES, "image")}
PART_OF = re.compile(r"(.+)-(\d+)-of-(\d+)\.tar")
Stamp = tuple[int, int]  # size in bytes and time of the last change in nanoseconds
# What an index says of each sample. `key` is `<class>/<name>` in UTF-8, as long as the longest; `label` is -1 without a .cls
# member; `latent` and `image` are offset and size in bytes of the member, -1 where there is none.
FIELDS: list[tuple[Any, ...]] = [("label", np.int64), ("latent", np.int64, 2), ("image", np.int64, 2)]


class Shards:
    """The samples of all shards of a folder, in the order of shard names and of places within.

    Args:
        folder: holds `*.tar`. Names like `train-00000-of-00010.tar` promise how many there are.
        index_dir: where index files are kept, default `folder`. Missing ones are made.

    Attributes:
        index: of all samples, an array of `FIELDS`. labels: its labels, -1 where there is none.

    Raises:
        FileNotFoundError: when the folder, its shards or some of them are missing.
        ValueError: when a shard is cut short or damaged, or an index cannot be written; the message names it.
    """

    def __init__(self, folder: str | Path, index_dir: str | Path | None = None) -> None:
        self.paths = list_shards(folder)
        self.stamps = [stamp_of(path) for path in self.paths]
        parts = load_indices(self.paths, self.stamps, Path(index_dir or folder))
        self.shard = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
        self.index = np.concatenate(parts)
        self.labels = self.index["label"]
        self._open: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self.index)

    def __getstate__(self) -> dict[str, object]:
        """Without the open files, which belong to this process."""
        return {**self.__dict__, "_open": {}}

    def __del__(self) -> None:
        for descriptor in getattr(self, "_open", {}).values():
            with contextlib.suppress(OSError):
                os.close(descriptor)

    @property
    def class_names(self) -> list[str]:
        """Names of the class folders of all samples, sorted; labels may count them in another order."""
        return sorted({os.fsdecode(key.rpartition(b"/")[0]) for key in self.index["key"].tolist()})

    @property
    def num_folders(self) -> int:
        """Class folders of all samples."""
        return len(self.class_names)

    def name(self, index: int, kind: str = "sample") -> str:
        """Shard and sample, for messages, whatever `kind` of member they are about."""
        return f"{self.paths[self.shard[index]]}: {os.fsdecode(self.index['key'][index])}"

    def need(self, *kinds: str) -> "Shards":
        """These shards, every sample of which has a latent, an image or a label.

        Raises:
            ValueError: with the first sample that lacks one.
        """
        for kind in kinds:
            absent = self.index[kind].reshape(len(self), -1)[:, 0] < 0
            if absent.any():
                member = {"latent": "latent (.safetensors)", "image": "image", "label": "label (.cls)"}[kind]
                raise ValueError(f"{self.name(int(absent.argmax()))} has no {member}; pack it with tools/build_shards.py")
        return self

    def read(self, index: int, kind: str) -> bytes:
        """The latent file or image file of a sample.

        Raises:
            ValueError: when the shard is missing, was changed since the start or ends too early; the message names it.
        """
        offset, size = self.index[kind][index].tolist()
        try:
            data = os.pread(self._descriptor(int(self.shard[index])), size, offset)
        except OSError as error:
            raise ValueError(f"{self.name(index)} cannot be read: {error}") from error
        if len(data) != size:
            raise ValueError(f"{self.name(index)} ends after {len(data)} of {size} bytes; the shard was cut short")
        return data

    def _descriptor(self, shard: int) -> int:
        """The open shard. Positioned reads share no file position, so forked workers may inherit it."""
        if shard not in self._open:
            if len(self._open) >= MAX_OPEN:
                os.close(self._open.pop(next(iter(self._open))))
            descriptor = os.open(self.paths[shard], os.O_RDONLY)
            if stamp_of(descriptor) != self.stamps[shard]:
                os.close(descriptor)
                raise OSError("the shard was changed since it was indexed; start again")
            self._open[shard] = descriptor
        return self._open[shard]


def list_shards(folder: str | Path) -> list[Path]:
    """The shards of a folder, sorted by name.

    Raises:
        FileNotFoundError: when there is no such folder, no shard in it, or one that the others' names promise is missing.
    """
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"no shard folder {folder}")
    paths = list_files(folder, (".tar",))
    if not paths:
        raise FileNotFoundError(f"{folder} holds no *.tar; pack a dataset with tools/build_shards.py")
    promised = {(m[1], len(m[2]), int(m[3])) for path in paths if (m := PART_OF.fullmatch(path.name))}
    for stem, digits, total in sorted(promised):
        names = [shard_name(stem, k, total, digits) for k in range(total)]
        absent = [name for name in names if not (Path(folder) / name).is_file()]
        if absent:
            raise FileNotFoundError(f"{folder} lacks {len(absent)} of {total} shards, first {absent[0]}; pack them again")
    return paths


def shard_name(stem: str, number: int, total: int, digits: int = 5) -> str:
    """`<stem>-00003-of-00010.tar`."""
    return f"{stem}-{number:0{digits}d}-of-{total:0{digits}d}.tar"


def stamp_of(file: Path | int) -> Stamp:
    """Size and time of a file, given by its path or open."""
    status = os.stat(file)
    return status.st_size, status.st_mtime_ns


def load_indices(paths: Sequence[Path], stamps: Sequence[Stamp], index_dir: Path) -> list[np.ndarray]:
    """The index of every shard; missing and outdated ones are made, shared out between the processes that ask at once."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)
    # Every process starts with a share of its own, so that an index is mostly made once and found by the others.
    first = len(paths) * rank // world
    order = [*range(first, len(paths)), *range(first)]
    bar = tqdm(order, desc="opening shards", unit="shard", delay=1, leave=False, disable=rank > 0 or None)
    found = {k: index_of(paths[k], stamps[k], index_dir) for k in bar}
    return [found[k] for k in range(len(paths))]


def index_of(shard: Path, stamp: Stamp, index_dir: Path) -> np.ndarray:
    """The index of a shard, out of its file; made when that is missing, damaged or of a shard with another size or time.

    Raises:
        ValueError: when the shard is damaged, or its index cannot be written.
    """
    path = index_dir / fit_name(shard.name, ".index.npz")
    # Whatever a damaged index leads to, it is made again.
    with contextlib.suppress(Exception):
        check_plain(path)
        with np.load(path, allow_pickle=False) as f:
            if f["version"] == VERSION and tuple(f["stamp"].tolist()) == stamp and _lies_within(f["samples"], stamp[0]):
                return f["samples"]
    index = scan_shard(shard)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial, open(partial, "wb") as f:
            np.savez(f, version=np.array(VERSION), stamp=np.array(stamp), samples=index)
    except OSError as error:
        raise ValueError(
            f"cannot write the index {path}: {error}; set data.dataset.index_dir to a folder that can be written"
        ) from error
    return index


def _lies_within(index: np.ndarray, size: int) -> bool:
    """Whether an array is an index of a shard of this size in bytes."""
    if index.ndim != 1 or index.dtype.descr[1:] != np.dtype(FIELDS).descr or not len(index):
        return False
    for kind in KINDS:
        offset, length = index[kind].T
        absent = (offset == -1) & (length == -1)
        inside = (offset >= 0) & (length >= 0) & (length <= size - offset)
        if not (absent | inside).all():
            return False
    return True


def scan_shard(path: Path) -> np.ndarray:
    """Find all members of a shard, reading their headers alone; the index is an array of `FIELDS`.

    Raises:
        ValueError: when the shard is cut short, damaged, compressed or empty, or holds two members for one thing.
    """
    samples: dict[str, dict[str, Any]] = {}
    try:
        check_plain(path)
        with tarfile.open(path, "r:") as tar:
            end = _scan_members(tar, samples)
    except ValueError as error:
        raise ValueError(f"shard {path}: {error}") from error
    except Exception as error:  # whatever tarfile stumbles over
        raise ValueError(f"shard {path} is cut short, damaged or compressed: {error}") from error
    with open(path, "rb") as f:
        f.seek(end)
        if f.read(2 * BLOCK) != bytes(2 * BLOCK):
            raise ValueError(f"shard {path} is cut short or damaged: it has no end mark at byte {end}; pack or copy it again")
    if not samples:
        raise ValueError(f"shard {path} holds no sample; expected <class>/<name>.safetensors or <class>/<name>.jpg")
    keys = np.array([os.fsencode(key) for key in samples])
    index = np.full(len(keys), -1, dtype=[("key", keys.dtype), *FIELDS])
    index["key"] = keys
    for row, members in zip(index, samples.values(), strict=True):
        for kind, place in members.items():
            row[kind] = place
    return index


def _scan_members(tar: tarfile.TarFile, samples: dict[str, dict[str, Any]]) -> int:
    """Enter the label, and offset and size of the other members, of each sample; returns where the last one ends."""
    end = 0
    for member in plain_members(tar):
        end = member.offset_data + -(-member.size // BLOCK) * BLOCK
        name = PurePosixPath(member.name)
        kind = KIND_OF.get(name.suffix.lower())
        if kind is None or not all(map(is_data, name.parts)):
            continue
        sample = samples.setdefault(str(name.with_suffix("")), {})
        if kind in sample:
            raise ValueError(f"{member.name} is the second {kind} of its sample")
        sample[kind] = _label(tar, member) if kind == "label" else (member.offset_data, member.size)
    return end


def plain_members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The plain files of an archive, one after the other.

    Raises:
        ValueError: for links, devices and sparse files, and for sizes that no file has.
    """
    for member in tar:
        if not 0 <= member.size <= MAX_MEMBER:  # a negative one would lead back, in a circle
            raise ValueError(f"{member.name} is said to have {member.size} bytes; pack the shard again")
        if member.isdir():
            continue
        if not member.isreg() or member.issparse():
            raise ValueError(f"{member.name} is no plain file; a link leads outside the shard, pack what it points to (tar -h)")
        yield member


def _label(tar: tarfile.TarFile, member: tarfile.TarInfo) -> int:
    text = read_member(tar, member)
    if not LABEL.fullmatch(text):
        raise ValueError(f"{member.name} holds {text[:20]!r} instead of a label")
    return int(text)


def read_member(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    """The content of a plain file."""
    file = tar.extractfile(member)
    assert file is not None, "links and folders are refused before"
    return file.read()
