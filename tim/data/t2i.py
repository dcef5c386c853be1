"""Text-to-image data: captioned images in buckets of equal size.

A jsonl has one object a line: `image_file` (relative to root_dir), `bucket` (`name-HxW`) and `captions` (a list). A
second file packs line numbers into batches of one size each. `tools/build_t2i_buckets.py` writes both.
"""

import re
from array import array
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tim.files import parse_json, read_json
from tim.images import open_rgb, to_tensor
from tim.listing import check_inside

BUCKET = re.compile(r"(?:.+-)?([0-9]+)x([0-9]+)")
KEYS = ("image_file", "bucket", "captions")
MOST_PIXELS = 1 << 26  # of a bucket, 8192 x 8192


class CaptionedImages:
    """Images with captions in buckets of equal size.

    Only offsets into the jsonl and size numbers are held, 12 bytes a line; a line is parsed again when it is loaded.

    Args:
        root_dir: folder that `image_file` is relative to.
        jsonl_dir: the jsonl file.
        packed_json: the batches: a list of lists of 0-based line numbers.
        factor: pixels per token along a side over the whole run; the sides of a bucket are floored to its multiples.
        resize: `crop` keeps the aspect ratio and cuts the middle, `squash` does not keep it.

    Attributes:
        batches: packed batches, each an array of line numbers of one size.

    Raises:
        FileNotFoundError: when the folder or a file is missing.
        ValueError: when a line or a batch cannot be used; the message names it.
    """

    def __init__(self, root_dir: str, jsonl_dir: str, packed_json: str, factor: int = 32, resize: str = "crop") -> None:
        if resize not in ("crop", "squash"):
            raise ValueError(f"data.dataset.resize={resize!r} is not one of crop, squash")
        if not Path(root_dir).is_dir():
            raise FileNotFoundError(f"no image folder {root_dir} (data.dataset.root_dir)")
        for key, path in (("jsonl_dir", jsonl_dir), ("packed_json", packed_json)):
            if not Path(path).is_file():
                raise FileNotFoundError(f"no file {path} (data.dataset.{key})")
        self.root, self.jsonl, self.resize = Path(root_dir), Path(jsonl_dir), resize
        self._offsets, self._size_of, self._sizes = _scan(self.jsonl, factor)
        self.batches = _read_batches(Path(packed_json), self._size_of, self._sizes)
        # The packed lines of each size side by side: what may stand in for one another.
        packed = np.unique(np.concatenate(self.batches))
        kinds = self._size_of[packed]
        ends = np.bincount(kinds, minlength=len(self._sizes)).cumsum()
        self._peers = np.split(packed[np.argsort(kinds, kind="stable")], ends[:-1])

    def __len__(self) -> int:
        return len(self._offsets)

    def size(self, index: int) -> tuple[int, int]:
        """(height, width) in pixels of the sample's bucket, floored to multiples of factor."""
        return self._sizes[self._size_of[index]]

    def peers(self, index: int) -> np.ndarray:
        """Line numbers, ascending, of the packed samples of the same size: what can stand in for an unreadable one."""
        return self._peers[self._size_of[index]]

    def load(self, index: int, g: np.random.Generator) -> dict[str, Any]:
        """`image` (3, H, W) float32 in [-1, 1] and `caption`, one of the sample's captions drawn by `g`.

        Raises:
            ValueError: when the image is missing or unreadable; the message names the file.
        """
        image_file, captions = self._entry(index)
        image = fit(open_rgb(self.root / image_file, upright=True), *self.size(index), self.resize)
        return {"image": to_tensor(image), "caption": captions[int(g.integers(len(captions)))]}

    def captions(self, index: int) -> list[str]:
        """All captions of a sample."""
        return self._entry(index)[1]

    def _entry(self, index: int) -> tuple[str, list[str]]:
        with open(self.jsonl, "rb") as f:
            f.seek(self._offsets[index])
            image_file, _, captions = parse_line(f.readline())
        return image_file, captions


def prompts_by_size(dataset: CaptionedImages, limit: int | None = None) -> dict[tuple[int, int], list[str]]:
    """First captions of the packed samples without repeats, keyed by the (height, width) they were trained at.

    Args:
        limit: at most so many in all, spread evenly over the set.
    """
    first: dict[str, tuple[int, int]] = {}
    for index in np.sort(np.concatenate(dataset.batches)):
        first.setdefault(dataset.captions(int(index))[0], dataset.size(int(index)))
    captions = list(first)
    if limit is not None and limit < len(captions):
        captions = [captions[int(k)] for k in np.linspace(0, len(captions) - 1, limit)]
    out: dict[tuple[int, int], list[str]] = {}
    for caption in captions:
        out.setdefault(first[caption], []).append(caption)
    return out


def fit(image: Image.Image, height: int, width: int, resize: str) -> Image.Image:
    """Scale to height x width pixels, bicubic and antialiased: the largest centred part of that aspect ratio, or all of it.

    Args:
        resize: `crop` or `squash`.
    """
    w, h = (image.width, image.height) if resize == "squash" else (
        min(image.width, image.height * width / height), min(image.height, image.width * height / width)
    )  # fmt: skip
    box = ((image.width - w) / 2, (image.height - h) / 2, (image.width + w) / 2, (image.height + h) / 2)
    return image.resize((width, height), Image.Resampling.BICUBIC, box=box, reducing_gap=3.0)


def parse_line(line: bytes) -> tuple[str, tuple[int, int], list[str]]:
    """image_file, (height, width) of the bucket and captions of one line.

    Raises:
        ValueError: with the cause when the line is malformed.
    """
    entry = parse_json(line) if line.strip() else None
    if not isinstance(entry, dict):
        raise ValueError("expected a JSON object, got " + ("a blank line" if not line.strip() else type(entry).__name__))
    for key in KEYS:
        if key not in entry:
            raise ValueError(f"key {key!r} is missing")
    image_file, bucket, captions = (entry[key] for key in KEYS)
    if not isinstance(image_file, str) or not image_file:
        raise ValueError(f"image_file must be a file name, got {image_file!r}")
    check_inside(image_file)
    match = BUCKET.fullmatch(bucket) if isinstance(bucket, str) else None
    if match is None:
        raise ValueError(f"bucket {bucket!r} is not of the form name-HxW")
    height, width = int(match[1]), int(match[2])
    if height * width > MOST_PIXELS:
        raise ValueError(f"bucket {bucket!r} has more than {MOST_PIXELS} pixels")
    if not isinstance(captions, list) or not captions or not all(isinstance(c, str) for c in captions):
        raise ValueError(f"captions must be a list of at least one string, got {str(captions)[:80]}")
    for text in (image_file, *captions):
        text.encode()  # lone surrogates are valid JSON and no text
    return image_file, (height, width), captions


def _scan(path: Path, factor: int) -> tuple[np.ndarray, np.ndarray, list[tuple[int, int]]]:
    """Validate every line; the byte offset and size number of each, and the sizes."""
    offsets, size_of = array("q"), array("i")
    sizes: dict[tuple[int, int], int] = {}
    with open(path, "rb") as f:
        start = 0
        for number, line in enumerate(f, start=1):
            try:
                _, (height, width), _ = parse_line(line)
            except ValueError as error:
                raise ValueError(f"{path} line {number}: {error}") from error
            size = (height // factor * factor, width // factor * factor)
            if 0 in size:
                raise ValueError(f"{path} line {number}: bucket {height}x{width} has a side below {factor} pixels")
            offsets.append(start)
            size_of.append(sizes.setdefault(size, len(sizes)))
            start += len(line)
    if not offsets:
        raise ValueError(f"{path} is empty; expected one JSON object a line")
    return np.array(offsets), np.array(size_of), list(sizes)


def _read_batches(path: Path, size_of: np.ndarray, sizes: list[tuple[int, int]]) -> list[np.ndarray]:
    """The packed batches, each checked to hold line numbers of one size."""
    packed = read_json(path)
    if not isinstance(packed, list) or not packed:
        raise ValueError(f"{path} must be a list of at least one batch of line numbers")
    batches = []
    for number, batch in enumerate(packed):
        where = f"{path} batch {number} (counted from 0)"
        if not isinstance(batch, list) or any(type(line) is not int for line in batch):
            raise ValueError(f"{where} must be a list of line numbers, got {str(batch)[:80]}")
        if not batch:
            raise ValueError(f"{where} is a bucket that names no line")
        outside = [line for line in batch if not 0 <= line < len(size_of)]
        if outside:
            raise ValueError(f"{where} names line {outside[0]}; the jsonl has lines 0 to {len(size_of) - 1}")
        lines = np.array(batch)
        kinds = np.unique(size_of[lines])
        if len(kinds) > 1:
            names = ", ".join("{}x{}".format(*sizes[k]) for k in kinds)
            raise ValueError(f"{where} mixes buckets of the sizes {names}; a batch has one size")
        batches.append(lines)
    return batches
