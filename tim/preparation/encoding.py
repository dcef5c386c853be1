"""Every image of a class folder encoded once, into a file of its own: what latents and REPA features share.

Images are encoded in blocks of `batch_size` that do not depend on what is already there, so files do not depend on the
number of processes or on interruptions. To continue, run the same command again: only missing and damaged files are made.
"""

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from tim.data.folders import Folder, check_stems, stored_name
from tim.distributed import use_cpu
from tim.resumable import Block, first_process, locked, own_blocks, progress_bar, total_over_processes

PATIENCE = timedelta(days=1)  # how long a process waits for slower ones
Loader = Callable[[Path], Tensor]


class Source(NamedTuple):
    """An image and the file that it becomes."""

    image: Path
    target: Path
    label: int


class Images(Dataset):
    """Reads images in worker processes; an item is (index, pixels or None, cause of failure)."""

    def __init__(self, sources: Sequence[Source], load: Loader) -> None:
        self.sources, self.load = sources, load

    def __getitem__(self, index: int) -> tuple[int, Tensor | None, str]:
        try:
            return index, self.load(self.sources[index].image), ""
        except (ValueError, OSError) as error:
            return index, None, str(error)


class FolderEncoder(ABC):
    """Makes the files of all images of class folders that are missing or damaged; subclasses say what the files hold.

    Args:
        image_dir: class folders of images. target_dir: class folders of what is made of them.
        load: pixels of an image, ValueError or OSError when it cannot be read. Worker processes get it.
        batch_size: images per process encoded together.
        one_size: whether all images have the same; otherwise they are encoded one by one.
        num_workers: processes that read images.

    Attributes:
        what: the files' content, for messages.
        sources: all images in the order of class folders and names; labels count the class folders.

    Raises:
        FileNotFoundError: when image_dir is missing or holds no class folder.
        ValueError: when a class is empty, or two images would become one file.
    """

    what: str

    def __init__(
        self, image_dir: str, target_dir: Path, load: Loader, batch_size: int, one_size: bool, num_workers: int
    ) -> None:
        self.image_dir, self.target_dir, self.load = image_dir, target_dir, load
        self.batch_size, self.one_size, self.num_workers = batch_size, one_size, num_workers
        self.state = PartialState(cpu=use_cpu(), timeout=PATIENCE)
        folder = Folder("image", image_dir)
        paths = folder.paths["image"]
        check_stems(paths, "both become {}.safetensors")
        targets = [target_dir / path.parent.name / stored_name(path) for path in paths]
        self.sources = [Source(*entry) for entry in zip(paths, targets, folder.labels.tolist(), strict=True)]

    @abstractmethod
    def claim(self, write: bool) -> None:
        """Make target_dir belong to this run's settings, with False only compare. ValueError when it does not."""

    @abstractmethod
    def find_corruption(self, path: Path) -> str | None:
        """What is wrong with a file, None when nothing is."""

    @abstractmethod
    def encode(self, indices: Sequence[int], pairs: Tensor) -> Tensor:
        """What B images become. `indices` are theirs in the list of all.

        Args:
            pairs: (2B, 3, H, W) in [-1, 1], every image followed by its mirror.

        Returns:
            (2B, ...).
        """

    @abstractmethod
    def write(self, source: Source, result: Tensor) -> None:
        """Store the result (2, ...) of an image."""

    def run(self, dry_run: bool) -> tuple[int, list[dict[str, Any]]] | None:
        """Make what is missing, shared out between the processes. Collective.

        Args:
            dry_run: check everything, say what is to do, write nothing and return None.

        Returns:
            how many files were to make; `index`, `file` and `cause` of the images that could not be read, in their order.
        """
        state, sources = self.state, self.sources
        first_process(state, lambda: self.claim(False))
        blocks = own_blocks(
            len(sources), self.batch_size, lambda k: self.find_corruption(sources[k].target) is None, state, "looking"
        )
        count = total_over_processes(sum(len(block.missing) for block in blocks))
        if state.is_main_process:
            print(f"{len(sources)} images in {self.image_dir}, {count} to encode into {self.target_dir}", flush=True)
        if dry_run:
            return None
        with locked(self.target_dir, state):
            first_process(state, self._begin)  # the others wait for the folders
            bad = self._encode_blocks(blocks)
            # Gathered under the lock, which is thus held until every process has written its last file.
            return count, sorted(gather_object(bad), key=lambda entry: entry["index"])

    def _begin(self) -> None:
        self.claim(True)
        for folder in {source.target.parent for source in self.sources}:
            folder.mkdir(exist_ok=True)

    def _encode_blocks(self, blocks: list[Block]) -> list[dict[str, Any]]:
        """Encode and write the missing images of this process's blocks; those that could not be read."""
        missing = [block.missing for block in blocks]
        images = Images(self.sources, self.load)
        loader = DataLoader(images, batch_sampler=missing, collate_fn=list, num_workers=self.num_workers)
        processes = self.state.num_processes
        share = f"encoding, process 1 of {processes}" if processes > 1 else "encoding"
        bad = []
        with progress_bar(blocks, self.state, share) as bar:
            for items in loader:
                pixels = {index: image for index, image, _ in items if image is not None}
                failed = {index: cause for index, image, cause in items if image is None}
                for indices, batch in self._batches(pixels):
                    pairs = torch.stack([batch, batch.flip(-1)], dim=1).flatten(0, 1)
                    results = self.encode(indices, pairs).cpu().unflatten(0, (-1, 2))
                    for index, result in zip(indices, results, strict=True):
                        if index not in pixels:
                            continue
                        if torch.isfinite(result).all():  # float16 ends at 65504
                            self.write(self.sources[index], result)
                        else:
                            failed[index] = f"its {self.what} would not be finite in {result.dtype}; choose a wider dtype"
                for index, cause in failed.items():
                    file = str(self.sources[index].image)
                    bad.append({"index": index, "file": file, "cause": cause})
                    tqdm.write(f"no {self.what} for {file}: {cause}", file=sys.stderr)
                bar.update(len(items))
                bar.set_postfix(unreadable=len(bad), refresh=False)
        return bad

    def _batches(self, pixels: dict[int, Tensor]) -> list[tuple[Sequence[int], Tensor]]:
        """What is encoded together: (indices, images), always of the same shape for the same images.

        Images of one size come as their whole block, with zeros for those that are done or unreadable, because rounding may
        depend on the size of a batch but not on its other members.
        """
        if not self.one_size:
            return [([index], image[None]) for index, image in pixels.items()]
        if not pixels:
            return []
        start = next(iter(pixels)) // self.batch_size * self.batch_size
        block = range(start, min(start + self.batch_size, len(self.sources)))
        nothing = torch.zeros_like(next(iter(pixels.values())))
        return [(block, torch.stack([pixels.get(index, nothing) for index in block]))]
