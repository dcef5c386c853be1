"""From class folders to tar shards: one sample after the other in the order of the folder, so numbers stay what they were."""

import contextlib
import io
import os
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from tim.data.folders import Folder, check_stems
from tim.data.shards import KINDS, index_of, scan_shard, shard_name, stamp_of
from tim.files import replacing
from tim.listing import list_files


class Sample(NamedTuple):
    """One sample to be packed: its key `<class>/<name>`, its files by kind, and the label that goes into a .cls member."""

    key: str
    files: dict[str, Path]
    label: int | None


def list_sources(latent_dir: str | None, image_dir: str | None) -> list[Sample]:
    """What is to be packed: latents, each with its image when image_dir is given too, or images alone with their labels.

    Raises:
        ValueError, FileNotFoundError: when a folder or file is missing, or two files of a class differ in the suffix alone.
    """
    if latent_dir is not None:
        folder = Folder("latent", latent_dir)
        if image_dir is not None:
            folder.add_images(image_dir)
    elif image_dir is not None:
        folder = Folder("image", image_dir)
    else:
        raise ValueError("nothing to pack: give --latent-dir, --image-dir, or both")
    own = folder.paths[folder.kind]
    check_stems(own, "be one sample")
    labels = [None] * len(own) if latent_dir is not None else folder.labels.tolist()  # latent files hold theirs
    files = [dict(zip(folder.paths, paths, strict=True)) for paths in zip(*folder.paths.values(), strict=True)]
    return [Sample(f"{path.parent.name}/{path.stem}", *rest) for path, *rest in zip(own, files, labels, strict=True)]


def build_shards(
    samples: Sequence[Sample],
    out: str | Path,
    samples_per_shard: int,
    stem: str = "shard",
    index_dir: str | Path | None = None,
    workers: int = 4,
) -> tuple[list[Path], int]:
    """Pack samples into `<out>/<stem>-<k>-of-<n>.tar`, leaving whole shards of the same samples as they are.

    Every shard is read again before it gets its name, and compared with what was put in.

    Args:
        samples_per_shard: the last shard may have fewer.
        index_dir: where the index files go, default `out`.
        workers: shards packed at once.

    Returns:
        The shards, and how many of them were packed now.

    Raises:
        ValueError: when `out` holds other shards.
        OSError: when a source cannot be read or a shard not be written.
    """
    if samples_per_shard < 1:
        raise ValueError(f"a shard must hold at least one sample, got {samples_per_shard}")
    out, chunks = Path(out), [samples[i : i + samples_per_shard] for i in range(0, len(samples), samples_per_shard)]
    paths = [out / shard_name(stem, k, len(chunks)) for k in range(len(chunks))]
    others = sorted({p.name for p in list_files(out, (".tar",))} - {p.name for p in paths}) if out.is_dir() else []
    if others:
        raise ValueError(f"{out} holds {len(others)} other shards, first {others[0]}; delete them or choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    folder = Path(index_dir or out)
    with ThreadPoolExecutor(workers) as pool:
        jobs = pool.map(lambda path, chunk: _ensure_shard(path, chunk, folder), paths, chunks)
        made = sum(tqdm(jobs, total=len(paths), desc="packing", unit="shard", disable=None))
    return paths, made


def _ensure_shard(path: Path, samples: Sequence[Sample], index_dir: Path) -> bool:
    """Pack a shard unless it is there, whole and of these samples; returns whether it was packed now."""
    if path.is_file():
        with contextlib.suppress(ValueError):  # a damaged shard is packed again
            if _holds(index_of(path, stamp_of(path), index_dir), samples):
                return False
    with replacing(path) as partial:
        sums = _write(partial, samples)
        index = scan_shard(partial)
        if not _holds(index, samples) or list(_checksums(partial, index)) != sums:
            raise OSError(f"{partial} is not what was written; is the disk full or failing?")
    index_of(path, stamp_of(path), index_dir)
    return True


def _holds(index: np.ndarray, samples: Sequence[Sample]) -> bool:
    """Whether a shard has these samples in this order, with these labels and files of today's sizes."""
    if index["key"].tolist() != [os.fsencode(sample.key) for sample in samples]:
        return False
    if index["label"].tolist() != [-1 if sample.label is None else sample.label for sample in samples]:
        return False
    return all(
        index[kind][:, 1].tolist() == [s.files[kind].stat().st_size if kind in s.files else -1 for s in samples]
        for kind in KINDS
    )


def _write(path: Path, samples: Sequence[Sample]) -> list[int]:
    """Write a tar file; returns the checksums of its latents and images. Its bytes depend on the samples alone."""
    sums = []
    with tarfile.open(path, mode="w") as tar:
        for sample in samples:
            for kind in KINDS:
                if kind in sample.files:
                    data = sample.files[kind].read_bytes()
                    sums.append(zlib.crc32(data))
                    _add(tar, sample.key + sample.files[kind].suffix, data)
            if sample.label is not None:
                _add(tar, f"{sample.key}.cls", str(sample.label).encode())
    return sums


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def _checksums(path: Path, index: np.ndarray) -> Iterator[int]:
    """Of the latents and images of a shard, in the order in which they were written."""
    with open(path, "rb") as f:
        for sample in index:
            for kind in KINDS:
                offset, size = sample[kind].tolist()
                if offset >= 0:
                    f.seek(offset)
                    yield zlib.crc32(f.read(size))
