"""What a sampling run draws: groups of images, and the files each group becomes."""

from pathlib import Path
from typing import Protocol

import numpy as np
from tqdm import tqdm

from tim.files import replacing
from tim.images import read_png, save_png


class Job(Protocol):
    """`groups` units of work with `per_group` images each; image j of group g has index g and repetition j."""

    groups: int
    per_group: int

    def done(self, folder: Path, group: int) -> bool:
        """Whether all files of the group are there."""
        ...

    def write(self, folder: Path, group: int, images: np.ndarray) -> None:
        """Write the files of a group, images (per_group, H, W, 3) uint8; each file whole or absent."""
        ...

    def pictures(self, folder: Path, limit: int) -> list[np.ndarray]:
        """Up to `limit` of the first pictures, for the overview."""
        ...


class ClassJob:
    """`{index:06d}.png`, one image a group."""

    per_group = 1

    def __init__(self, total: int) -> None:
        self.groups = total

    def path(self, folder: Path, group: int) -> Path:
        """The file of an image."""
        return folder / f"{group:06d}.png"

    def done(self, folder: Path, group: int) -> bool:
        return self.path(folder, group).is_file()

    def write(self, folder: Path, group: int, images: np.ndarray) -> None:
        save_png(self.path(folder, group), images[0])

    def pictures(self, folder: Path, limit: int) -> list[np.ndarray]:
        return [read_png(self.path(folder, g)) for g in range(min(limit, self.groups))]


def pack_npz(folder: Path, job: ClassJob) -> Path:
    """All images as arr_0 (N, H, W, 3) uint8 in `<folder>.npz`, the form ADM's evaluator reads."""
    path = folder.with_name(f"{folder.name}.npz")
    images = np.stack([read_png(job.path(folder, g)) for g in tqdm(range(job.groups), desc="npz", unit="img")])
    with replacing(path) as partial, open(partial, "wb") as f:
        np.savez(f, arr_0=images)
    return path
