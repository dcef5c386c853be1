"""Features of any number of images in constant memory: kept in chunks on disk, shared by processes, never computed twice."""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from tim.evaluation import BATCH, CACHE
from tim.evaluation.inputs import ImageArray, ImageFiles, Transform
from tim.files import claim, replacing
from tim.resumable import first_process, own_blocks, total_over_processes

CHUNK_BATCHES = 16  # a chunk holds at most so many batches: what an interruption can lose

Network = Callable[[Tensor], dict[str, Tensor]]


@dataclass(frozen=True)
class FeatureExtractor:
    """What turns images into features: the interface of all feature networks.

    Attributes:
        name: for humans, beside every number.
        identity: what the features depend on besides the images (network, weights, resize, precision): the cache's key.
        transform: uint8 (H, W, 3) to the network's input.
        network: a batch on the device to named features (B, D).
    """

    name: str
    identity: dict[str, Any]
    transform: Transform
    network: Network


class Features:
    """Features of `count` images in chunk files, in the order of the images.

    Attributes:
        images_per_second: of the call that extracted them, None when all were there already.
    """

    def __init__(self, folder: Path, count: int, chunk: int, images_per_second: float | None = None) -> None:
        self.folder, self.count, self.chunk, self.images_per_second = folder, count, chunk, images_per_second

    def __len__(self) -> int:
        return self.count

    def path(self, index: int) -> Path:
        """File of a chunk."""
        return self.folder / f"{index:06d}.npz"

    @property
    def chunks(self) -> int:
        """Number of chunks."""
        return -(-self.count // self.chunk)

    def rows(self, index: int) -> range:
        """Images of a chunk."""
        return range(index * self.chunk, min((index + 1) * self.chunk, self.count))

    def parts(self, name: str) -> Iterator[np.ndarray]:
        """Feature `name` chunk after chunk, (rows, D) float32 each."""
        for index in range(self.chunks):
            with np.load(self.path(index)) as chunk:
                yield chunk[name]

    def array(self, name: str) -> np.ndarray:
        """Feature `name` of all images, (N, D) float32."""
        return np.concatenate(list(self.parts(name)))


def extract(
    images: ImageFiles | ImageArray,
    network: Network,
    identity: dict[str, Any],
    state: PartialState,
    cache: Path = CACHE,
    batch_size: int = BATCH,
    workers: int | None = None,
    desc: str = "features",
) -> Features:
    """Features of all images, computed by all processes together.

    A batch always holds the same images, so the numbers do not depend on the number of processes; chunks that an earlier
    call has written, also an interrupted one, are taken as they are.

    Args:
        images: what to look at; their fingerprint is part of the cache's key.
        network: a batch on the device to named features (B, D).
        identity: what the features depend on besides the images: network, weights, resize, precision.
        state: the processes that share the work.
        cache: folder of kept features; one subfolder for each identity.
        workers: processes that read images (default: up to 8, none for small sets).

    Raises:
        ValueError: names images that cannot be read; chunks written before stay.
    """
    # few images are spread over chunks too, so that every process has some
    batches = -(-len(images) // batch_size)
    chunk = batch_size * min(CHUNK_BATCHES, max(1, -(-batches // 64)))
    identity = {**identity, "images": images.fingerprint, "chunk": chunk}
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    features = Features(Path(cache) / key, len(images), chunk)
    first_process(state, lambda: claim(features.folder / "identity.json", identity, "features"))
    blocks = own_blocks(features.chunks, 1, lambda k: features.path(k).is_file(), state)
    own = [block.items.start for block in blocks]
    began = time.perf_counter()
    if own:
        _run(images, network, features, own, state, batch_size, workers, desc)
    extracted = total_over_processes(sum(len(features.rows(k)) for k in own))
    if extracted:
        features.images_per_second = extracted / (time.perf_counter() - began)
    return features


@dataclass(frozen=True)
class Extraction:
    """A feature extractor, the processes that run it, and where features are kept; see `extract`."""

    extractor: FeatureExtractor
    state: PartialState
    cache: Path = CACHE
    batch_size: int = BATCH
    workers: int | None = None

    def run(self, images: ImageFiles | ImageArray, desc: str) -> Features:
        """Features of images that are already in the form that the network takes."""
        network, identity = self.extractor.network, self.extractor.identity
        return extract(images, network, identity, self.state, self.cache, self.batch_size, self.workers, desc)

    def run_files(self, files: Sequence[Path], desc: str) -> Features:
        """Features of image files."""
        return self.run(ImageFiles(files, self.extractor.transform), desc)


@torch.inference_mode()
def _run(
    images: ImageFiles | ImageArray,
    network: Network,
    features: Features,
    own: list[int],
    state: PartialState,
    batch_size: int,
    workers: int | None,
    desc: str,
) -> None:
    batches = [
        list(features.rows(k))[start : start + batch_size] for k in own for start in range(0, len(features.rows(k)), batch_size)
    ]
    loader = DataLoader(
        images,
        batch_sampler=batches,
        collate_fn=_collate,
        num_workers=_workers(workers, len(batches), state.num_processes),
        pin_memory=state.device.type == "cuda",
    )
    total = sum(map(len, batches))
    rows: dict[str, list[np.ndarray]] = {}
    place = 0
    with tqdm(total=total, desc=desc, unit="img", disable=not state.is_main_process, dynamic_ncols=True) as bar:
        for batch in loader:
            if isinstance(batch, list):
                raise ValueError("; ".join(batch))
            for name, values in network(batch.to(state.device, non_blocking=True)).items():
                rows.setdefault(name, []).append(values.float().cpu().numpy())
            bar.update(len(batch))
            if sum(map(len, next(iter(rows.values())))) == len(features.rows(own[place])):
                _write(features.path(own[place]), {name: np.concatenate(parts) for name, parts in rows.items()})
                rows, place = {}, place + 1


def _collate(items: list[Tensor | str]) -> Tensor | list[str]:
    """A batch, or what is wrong with some of its images."""
    problems = [item for item in items if isinstance(item, str)]
    return problems or torch.stack([item for item in items if isinstance(item, Tensor)])


def _workers(wanted: int | None, batches: int, processes: int) -> int:
    if wanted is not None:
        return wanted
    cores = (os.cpu_count() or 1) // processes
    return 0 if batches < 8 else max(0, min(8, cores - 1))


def _write(path: Path, arrays: dict[str, Any]) -> None:
    with replacing(path) as partial, open(partial, "wb") as f:
        np.savez(f, **arrays)
