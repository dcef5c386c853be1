"""What a set of images is: the files of a folder, or arr_0 of an `.npz`, which is not read whole."""

import hashlib
import json
import shutil
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from tim.files import replacing
from tim.images import IMAGE_SUFFIXES, image_size, read_png
from tim.listing import check_plain, list_files

SHOWN = 5  # names in a message
LOCAL_HEADER = 30  # bytes of a zip member's fixed header; name and extra field follow

Transform = Callable[[np.ndarray], Tensor]


def find_images(folder: str | Path) -> list[Path]:
    """Image files at any depth below a folder, sorted by their path; hidden files and folders do not count.

    Raises:
        FileNotFoundError: when there is no such folder.
        ValueError: when it holds no image.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}")
    files = list_files(folder, IMAGE_SUFFIXES, deep=True)
    if not files:
        raise ValueError(f"{folder} holds no image ({', '.join(IMAGE_SUFFIXES)})")
    return sorted(files, key=lambda p: p.relative_to(folder).as_posix())


def shown(names: Sequence[str], most: int = SHOWN) -> str:
    """The first of some names, for a message."""
    return ", ".join([*names[:most], *["..."] * (len(names) > most)])


def some(names: Sequence[str]) -> str:
    """Number of names and the first of them, for a message."""
    return f"{len(names)} ({shown(names)})"


def stamp(path: Path) -> list[int]:
    """Size and time of a file, by which a result knows whether its file has changed."""
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]


def fingerprint(files: Sequence[Path]) -> str:
    """sha256 of names, sizes and modification times, so that cached results of other files are not taken for theirs."""
    stats = [(str(path.resolve()), *stamp(path)) for path in files]
    return hashlib.sha256(json.dumps(stats).encode()).hexdigest()


def check_one_size(files: Sequence[Path], progress: bool = False) -> tuple[int, int]:
    """(width, height) that all images share; reads headers only.

    Raises:
        ValueError: names images of another size than most, or that are no images.
    """
    sizes: dict[tuple[int, int], list[Path]] = {}
    for path in tqdm(files, desc="sizes", unit="img", disable=not progress, leave=False):
        sizes.setdefault(image_size(path), []).append(path)
    common = max(sizes, key=lambda size: len(sizes[size]))
    odd = [f"{path} ({size[0]}x{size[1]})" for size, paths in sizes.items() if size != common for path in paths]
    if odd:
        raise ValueError(f"images differ in size: most are {common[0]}x{common[1]}, but not {shown(odd)}")
    return common


def as_uint8_tensor(pixels: np.ndarray) -> Tensor:
    """uint8 (H, W, 3) to (3, H, W), a copy."""
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())


class ImageFiles(Dataset[Tensor | str]):
    """Images of files, each turned into a tensor by `transform` where it is read.

    Args:
        files: image files.
        transform: uint8 (H, W, 3) to the tensor the feature network takes.

    An image that cannot be read comes out as the text that says why, because exceptions lose their type on the way out
    of a worker process.
    """

    def __init__(self, files: Sequence[Path], transform: Transform = as_uint8_tensor) -> None:
        self.files, self.transform = list(files), transform
        self.fingerprint = fingerprint(self.files)

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        """An image, for messages."""
        return str(self.files[index])

    def __getitem__(self, index: int) -> Tensor | str:
        path = self.files[index]
        try:
            return self.transform(read_png(path))
        except ValueError as error:
            return str(error) if str(path) in str(error) else f"{path}: {error}"


class ImageArray(Dataset[Tensor | str]):
    """Images of an array (N, H, W, 3) uint8, such as a memory map; `source` names it in messages."""

    def __init__(self, array: np.ndarray, fingerprint: str, source: str | Path = "array") -> None:
        self.array, self.fingerprint, self.source = array, fingerprint, source

    def __len__(self) -> int:
        return len(self.array)

    def name(self, index: int) -> str:
        """An image, for messages."""
        return f"{self.source}: image {index}"

    def __getitem__(self, index: int) -> Tensor:
        return as_uint8_tensor(np.asarray(self.array[index]))


def open_images(
    path: str | Path, scratch: Path, progress: bool = False, files: Sequence[Path] | None = None
) -> ImageFiles | ImageArray:
    """The images of a folder, all of one size, or of an `.npz` in ADM's form, as uint8 tensors.

    Args:
        path: folder, or .npz with arr_0 (N, H, W, 3) uint8.
        scratch: folder where a compressed arr_0 is unpacked to.
        progress: show a bar while sizes are checked.
        files: the images of a folder that count; all when None.

    Raises:
        FileNotFoundError: when there is no such file or folder.
        ValueError: for an empty folder, images of several sizes, a damaged file, or an npz without images.
    """
    path = Path(path)
    if path.is_dir():
        files = find_images(path) if files is None else files
        check_one_size(files, progress)
        return ImageFiles(files)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is neither a folder of images nor an .npz")
    array = map_member(path, "arr_0", scratch)
    if array.ndim != 4 or array.shape[3] != 3 or array.dtype != np.uint8 or not len(array):
        raise ValueError(f"{path}: arr_0 must be uint8 images (N, H, W, 3), got {array.dtype} {array.shape}")
    return ImageArray(array, fingerprint([path]), path)


def npz_names(path: Path) -> list[str]:
    """Names of the arrays of an `.npz`.

    Raises:
        ValueError: when it is none.
    """
    try:
        check_plain(path)
        with zipfile.ZipFile(path) as archive:
            return [name.removesuffix(".npy") for name in archive.namelist()]
    except (zipfile.BadZipFile, OSError) as error:
        raise ValueError(f"{path} is damaged or no .npz: {error}") from error


def npz_arrays(path: Path, names: Sequence[str]) -> list[np.ndarray]:
    """Arrays of an `.npz` by name, read whole; nothing is unpickled.

    Raises:
        ValueError: when one is missing or damaged.
    """
    with _reading(path, ", ".join(names)), np.load(path, allow_pickle=False) as file:
        return [file[name] for name in names]


def write_npz(path: Path, arrays: Mapping[str, Any]) -> None:
    """Write an `.npz`, whole or not at all, in a folder that is made when it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial, open(partial, "wb") as f:
        np.savez(f, **arrays)


def map_member(path: Path, name: str, scratch: Path) -> np.ndarray:
    """Memory map of an array of an `.npz`; a compressed one is unpacked into `scratch` first.

    Raises:
        ValueError: when there is no such array, or the file is damaged.
    """
    if name not in npz_names(path):
        raise ValueError(f"{path} holds no {name}, only {', '.join(npz_names(path))}")
    with _reading(path, name):
        with zipfile.ZipFile(path) as archive:
            info = archive.getinfo(f"{name}.npy")
            if info.compress_type != zipfile.ZIP_STORED:
                unpacked = scratch / f"{fingerprint([path])[:16]}-{name}.npy"
                if not unpacked.is_file():
                    scratch.mkdir(parents=True, exist_ok=True)
                    with archive.open(info) as source, replacing(unpacked) as partial, open(partial, "wb") as out:
                        shutil.copyfileobj(source, out, 1 << 22)
                return np.load(unpacked, mmap_mode="r")
        # The data follow the member's own header, whose lengths may differ from those in the archive's directory.
        with open(path, "rb") as f:
            f.seek(info.header_offset)
            name_length, extra_length = struct.unpack("<HH", f.read(LOCAL_HEADER)[26:30])
            f.seek(info.header_offset + LOCAL_HEADER + name_length + extra_length)
            version = np.lib.format.read_magic(f)
            read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = read_header(f)
            if dtype.hasobject:
                raise ValueError(f"{name} is no plain array")
            return np.memmap(path, dtype=dtype, mode="r", offset=f.tell(), shape=shape, order="F" if fortran else "C")


@contextmanager
def _reading(path: Path, what: str) -> Iterator[None]:
    """Damage of an `.npz`, whatever reads it, as a ValueError that names file and array."""
    try:
        yield
    except Exception as error:  # whatever the header of an array leads to
        raise ValueError(f"{path}: {what} cannot be read: {error}") from error
