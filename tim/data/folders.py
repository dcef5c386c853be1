"""Samples in class folders: `root/<class>/<name>.*`. Classes and files are numbered in the order of their names."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from tim.images import IMAGE_SUFFIXES
from tim.listing import check_plain, fit_name, list_files, list_folders

STORED = ".safetensors"  # files of latents and features
SUFFIXES = {"image": IMAGE_SUFFIXES, "latent": (STORED,), "features": (STORED,)}


class Folder:
    """Files of samples; what another folder holds of the same samples can be added.

    Args:
        kind: of the files, `image` or `latent`.
        root: holds the class folders.

    Attributes:
        root: as given. paths: kind -> a file for each sample.
        labels: (n,) int64, numbers of the class folders. num_folders: how many there are. class_names: what they are called.

    Raises:
        FileNotFoundError: when root is missing or holds no folder.
        ValueError: when a folder is empty.
    """

    def __init__(self, kind: str, root: str | Path) -> None:
        folders = class_folders(root)
        files = [list_files(folder, SUFFIXES[kind]) for folder in folders]
        for folder, found in zip(folders, files, strict=True):
            if not found:
                raise ValueError(f"class folder {folder} is empty; fill or remove it")
        self.kind, self.root, self.num_folders = kind, Path(root), len(folders)
        self.class_names = [folder.name for folder in folders]
        self.paths = {kind: [path for found in files for path in found]}
        self.labels = np.repeat(np.arange(len(folders)), [len(found) for found in files])

    def __len__(self) -> int:
        return len(self.labels)

    def add_images(self, root: str | Path) -> None:
        """Add the image of each sample: same class folder, same stem.

        Raises:
            FileNotFoundError: when a sample has none.
        """
        own = self.paths[self.kind]
        images = find_beside(own, Path(root), "image")
        for path in own:
            if path not in images:
                raise FileNotFoundError(f"{self.kind} {path} has no image {Path(root) / path.parent.name / path.stem}.*")
        self.paths["image"] = list(images.values())

    def name(self, index: int, kind: str) -> str:
        """The file, for messages."""
        return str(self.paths[kind][index])

    def read(self, index: int, kind: str) -> bytes:
        """The content of a file.

        Raises:
            ValueError: when it is missing or cannot be read; the message names it.
        """
        try:
            check_plain(self.paths[kind][index])
            return self.paths[kind][index].read_bytes()
        except OSError as error:
            raise ValueError(f"{self.name(index, kind)} cannot be read: {error}") from error


def class_folders(root: str | Path) -> list[Path]:
    """Class folders sorted by name.

    Raises:
        FileNotFoundError: when root is missing or holds no folder.
    """
    if not Path(root).is_dir():
        raise FileNotFoundError(f"no dataset folder {root}")
    folders = list_folders(root)
    if not folders:
        raise FileNotFoundError(f"{root} holds no class folders; expected {root}/<class>/<file>")
    return folders


def stored_name(path: Path) -> str:
    """Name of the file of latents or features of a sample, of which `path` is any file: its stem and `.safetensors`."""
    return fit_name(path.stem, STORED)


def find_beside(paths: Sequence[Path], root: Path, kind: str) -> dict[Path, Path]:
    """The file under `root` with the class folder and stem of each path that has one, in the order of the paths."""
    folders = [root / name for name in {path.parent.name for path in paths}]
    there = {(f.name, stored_name(p)): p for f in folders if f.is_dir() for p in list_files(f, SUFFIXES[kind])}
    own = {path: (path.parent.name, stored_name(path)) for path in paths}
    return {path: there[key] for path, key in own.items() if key in there}


def check_stems(paths: Iterable[Path], fate: str) -> None:
    """ValueError when two files of a class differ in the suffix alone; `fate` says what they would be, `{}` is their stem."""
    seen: dict[tuple[str, str], Path] = {}
    for path in paths:
        first = seen.setdefault((path.parent.name, path.stem), path)
        if first is not path:
            raise ValueError(f"{first} and {path.name} would {fate.format(path.stem)}; rename one")
