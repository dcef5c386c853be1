"""Folders of images as the evaluations see them."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from tim.images import IMAGE_SUFFIXES

SHOWN = 5  # files named in an error


def find_images(folder: str | Path) -> list[Path]:
    """Image files at any depth below a folder, sorted by their path; hidden files do not count.

    Raises:
        FileNotFoundError: when there is no such folder.
        ValueError: when it holds no image.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}")
    files = [p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith(".") and p.is_file()]
    if not files:
        raise ValueError(f"{folder} holds no image ({', '.join(IMAGE_SUFFIXES)})")
    return sorted(files, key=lambda p: p.relative_to(folder).as_posix())


def some(names: Sequence[str]) -> str:
    """Number of names and the first of them, for a message."""
    return f"{len(names)} ({', '.join(names[:SHOWN])}{', ...' if len(names) > SHOWN else ''})"


def stamp(path: Path) -> list[int]:
    """Size and time of a file, by which a record knows whether its file has changed."""
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
        try:
            with Image.open(path) as image:
                sizes.setdefault(image.size, []).append(path)
        except OSError as error:
            raise ValueError(f"{path} cannot be read as an image: {error}") from error
    common = max(sizes, key=lambda size: len(sizes[size]))
    odd = [f"{path} ({size[0]}x{size[1]})" for size, paths in sizes.items() if size != common for path in paths]
    if odd:
        more = f" and {len(odd) - SHOWN} more" if len(odd) > SHOWN else ""
        raise ValueError(f"images differ in size: most are {common[0]}x{common[1]}, but not {', '.join(odd[:SHOWN])}{more}")
    return common
