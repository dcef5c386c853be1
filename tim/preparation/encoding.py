"""Every image of a class folder encoded once, into a file of its own: what latents and REPA features share.

Images are encoded in blocks of `batch_size` that do not depend on what is already there, so files do not depend on the
number of processes or on interruptions. To continue, run the same command again: only missing and damaged files are made.
"""

import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from tim.data.folders import Folder, check_stems
from tim.images import UNREADABLE
from tim.resumable import Block, progress_bar

PATIENCE = timedelta(days=1)  # how long a process waits for slower ones


class Source(NamedTuple):
    """An image and the file that it becomes."""

    image: Path
    target: Path
    label: int


class Images(Dataset):
    """Reads images in worker processes; an item is (index, pixels or None, cause of failure)."""

    def __init__(self, sources: Sequence[Source], load: Callable[[Path], Tensor]) -> None:
        self.sources, self.load = sources, load

    def __getitem__(self, index: int) -> tuple[int, Tensor | None, str]:
        try:
            return index, self.load(self.sources[index].image), ""
        except UNREADABLE as error:
            return index, None, str(error)


def list_sources(image_dir: str, target_dir: Path) -> list[Source]:
    """All images in the order of class folders and names; labels count the class folders.

    Raises:
        FileNotFoundError: when image_dir is missing or holds no class folder.
        ValueError: when a class is empty, or two images would become one file.
    """
    folder = Folder("image", image_dir)
    paths = folder.paths["image"]
    check_stems(paths, "both become {}.safetensors")
    targets = [target_dir / path.parent.name / f"{path.stem}.safetensors" for path in paths]
    return [Source(*entry) for entry in zip(paths, targets, folder.labels.tolist(), strict=True)]


def encode_missing(
    what: str,
    sources: Sequence[Source],
    blocks: list[Block],
    load: Callable[[Path], Tensor],
    encode: Callable[[Sequence[int], Tensor], Tensor],
    write: Callable[[int, Tensor], None],
    block_size: int | None,
    num_workers: int,
    state: PartialState,
) -> list[dict[str, Any]]:
    """Encode and write the missing images of this process's blocks.

    Args:
        what: the files' content, for messages.
        load: pixels of an image, an `UNREADABLE` error when it cannot be read.
        encode: (indices, images (B, 3, H, W)) to one result an image (B, ...).
        write: stores the result of an image.
        block_size: images come as their whole block of this size, with zeros for those that are done or unreadable,
            because rounding may depend on the size of a batch but not on its other members. None: they come one by one.

    Returns:
        `index`, `file` and `cause` of the images that could not be read.
    """
    missing = [block.missing for block in blocks]
    loader = DataLoader(Images(sources, load), batch_sampler=missing, collate_fn=list, num_workers=num_workers)
    share = f"encoding, process 1 of {state.num_processes}" if state.num_processes > 1 else "encoding"
    bar = progress_bar(blocks, state, share)
    bad = []
    for items in loader:
        pixels = {index: image for index, image, _ in items if image is not None}
        for index, image, cause in items:
            if image is None:
                bad.append({"index": index, "file": str(sources[index].image), "cause": cause})
                tqdm.write(f"no {what} for {sources[index].image}: {cause}", file=sys.stderr)
        for indices, images in _batches(pixels, block_size, len(sources)):
            for index, result in zip(indices, encode(indices, images), strict=True):
                if index in pixels:
                    write(index, result)
        bar.update(len(items))
        bar.set_postfix(unreadable=len(bad), refresh=False)
    bar.close()
    return bad


def _batches(pixels: dict[int, Tensor], block_size: int | None, total: int) -> list[tuple[Sequence[int], Tensor]]:
    """What is encoded together: (indices, images), always of the same shape for the same images."""
    if block_size is None:
        return [([index], image[None]) for index, image in pixels.items()]
    if not pixels:
        return []
    start = next(iter(pixels)) // block_size * block_size
    block = range(start, min(start + block_size, total))
    nothing = torch.zeros_like(next(iter(pixels.values())))
    return [(block, torch.stack([pixels.get(index, nothing) for index in block]))]
