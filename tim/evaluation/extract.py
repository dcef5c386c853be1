"""Features of any number of images in constant memory: kept in chunks on disk, shared by processes, never computed twice."""

import hashlib
import json
import os
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from tim.evaluation import BATCH, CACHE
from tim.evaluation.inputs import ImageArray, ImageFiles, Transform, npz_arrays, write_npz
from tim.evaluation.metrics import Statistics, streaming_statistics
from tim.files import claim
from tim.resumable import first_process, own_blocks, total_over_processes

CHUNK_BATCHES = 16  # a chunk holds at most so many batches: what an interruption can lose


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
    network: Callable[[Tensor], dict[str, Tensor]]


class Features:
    """Features of `count` images in chunk files, in the order of the images.

    Attributes:
        images_per_second: of the call that extracted them, None when all were there already.
    """

    def __init__(self, folder: Path, count: int, chunk: int) -> None:
        self.folder, self.count, self.chunk = folder, count, chunk
        self.images_per_second: float | None = None

    def __len__(self) -> int:
        return self.count

    def path(self, index: int) -> Path:
        """File of a chunk."""
        return self.folder / f"{index:06d}.npz"

    def is_whole(self, index: int) -> bool:
        """Whether a chunk is there, and not cut short; an `.npz` ends with its table of contents."""
        return self.path(index).is_file() and zipfile.is_zipfile(self.path(index))

    def chunks(self) -> list[range]:
        """The images of each chunk."""
        return [range(start, min(start + self.chunk, self.count)) for start in range(0, self.count, self.chunk)]

    def parts(self, name: str, rows: np.ndarray | None = None) -> Iterator[np.ndarray]:
        """Feature `name` chunk after chunk, (n, D) float32 each; of the images at `rows` alone, in ascending order."""
        for index, images in enumerate(self.chunks()):
            try:
                (part,) = npz_arrays(self.path(index), [name])
            except ValueError as error:
                raise ValueError(f"{error}; delete it and run the same command again") from error
            if rows is not None:
                part = part[rows[(rows >= images.start) & (rows < images.stop)] - images.start]
            if len(part):
                yield part

    def array(self, name: str) -> np.ndarray:
        """Feature `name` of all images, (N, D) float32."""
        return np.concatenate(list(self.parts(name)))

    def statistics(self, name: str, rows: np.ndarray | None = None) -> Statistics:
        """Mean and covariance of feature `name`, of all images or those at `rows`."""
        return streaming_statistics(lambda: self.parts(name, rows))


@dataclass(frozen=True)
class Extraction:
    """A feature extractor, the processes that run it, and where features are kept.

    Attributes:
        state: the processes that share the work.
        cache: folder of kept features; one subfolder for each set of images and whatever else the features depend on.
        batch_size: images a batch.
        workers: processes that read images (default: up to 8, none for small sets).
    """

    extractor: FeatureExtractor
    state: PartialState
    cache: Path = CACHE
    batch_size: int = BATCH
    workers: int | None = None

    def run(self, images: ImageFiles | ImageArray, desc: str = "features") -> Features:
        """Features of images that are in the form that the network takes, computed by all processes together.

        A batch always holds the same images, so the numbers do not depend on the number of processes; chunks that an
        earlier call has written, also an interrupted one, are taken as they are.

        Raises:
            ValueError: names images that cannot be read or have no finite features, on all processes; chunks that are
                finished stay.
        """
        # few images are spread over chunks too, so that every process has some
        batches = -(-len(images) // self.batch_size)
        chunk = self.batch_size * min(CHUNK_BATCHES, max(1, -(-batches // 64)))
        identity = {**self.extractor.identity, "images": images.fingerprint, "chunk": chunk}
        key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
        features = Features(self.cache / key, len(images), chunk)
        first_process(self.state, lambda: claim(features.folder / "identity.json", identity, "features"))
        blocks = own_blocks(len(features.chunks()), 1, features.is_whole, self.state)
        own = {block.items.start: features.chunks()[block.items.start] for block in blocks}
        began = time.perf_counter()
        problem = None
        try:
            if own:
                self._extract(images, features, own, desc)
        except ValueError as error:  # of one process: the others hear of it, and go on with whatever comes next together
            problem = str(error)
        if problems := [words for words in gather_object([problem]) if words]:
            raise ValueError("; ".join(problems))
        extracted = total_over_processes(sum(map(len, own.values())))
        if extracted:
            features.images_per_second = extracted / (time.perf_counter() - began)
        return features

    def run_files(self, files: Sequence[Path], desc: str) -> Features:
        """Features of image files."""
        return self.run(ImageFiles(files, self.extractor.transform), desc)

    @torch.inference_mode()
    def _extract(self, images: ImageFiles | ImageArray, features: Features, own: dict[int, range], desc: str) -> None:
        """Write the chunks of these numbers and images."""
        size, device = self.batch_size, self.state.device
        batches = [list(rows[start : start + size]) for rows in own.values() for start in range(0, len(rows), size)]
        loader = iter(
            DataLoader(
                images,
                batch_sampler=batches,
                collate_fn=_collate,
                num_workers=self._processes(len(batches)),
                pin_memory=device.type == "cuda",
            )
        )
        total = sum(map(len, batches))
        with tqdm(total=total, desc=desc, unit="img", disable=not self.state.is_main_process, dynamic_ncols=True) as bar:
            for index, rows in own.items():
                found: dict[str, list[np.ndarray]] = {}
                for start, batch in zip(rows[::size], islice(loader, -(-len(rows) // size)), strict=True):
                    if isinstance(batch, list):
                        raise ValueError("; ".join(batch))
                    for name, values in self.extractor.network(batch.to(device, non_blocking=True)).items():
                        part = values.float().cpu().numpy()
                        if len(broken := np.flatnonzero(~np.isfinite(part).all(axis=1))):
                            raise ValueError(f"{images.name(start + broken[0])}: features {name!r} are not finite")
                        found.setdefault(name, []).append(part)
                    bar.update(len(batch))
                write_npz(features.path(index), {name: np.concatenate(parts) for name, parts in found.items()})

    def _processes(self, batches: int) -> int:
        """Processes that read images beside this one."""
        if self.workers is not None:
            return self.workers
        cores = (os.cpu_count() or 1) // self.state.num_processes
        return 0 if batches < 8 else max(0, min(8, cores - 1))


def _collate(items: list[Tensor | str]) -> Tensor | list[str]:
    """A batch, or what is wrong with some of its images."""
    problems = [item for item in items if isinstance(item, str)]
    return problems or torch.stack([item for item in items if isinstance(item, Tensor)])
