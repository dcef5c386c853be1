"""Pixels: files to arrays, arrays to files, arrays to grids."""

import math
import re
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import ExifTags, Image, ImageDraw
from torch import Tensor

from tim.files import replacing
from tim.labels import FONT_SIZE, draw_to_the_left, find_fonts, label_font, wrap
from tim.listing import check_plain

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
# What files of these suffixes may hold; Pillow knows other formats, and starts other programs for some.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
TURNS = {  # by EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
QUARTER_TURNS = (5, 6, 7, 8)
SHORT = 3  # EXIF's word for a number of 16 bits
SAMPLE_FORMAT = 339  # TIFF's tag: 1 for unsigned, 2 for signed numbers
PNG_LEVEL = 6  # zlib's and Pillow's own
LARGE = 1 << 24  # pixels; no larger image is made on the way to a crop
PAD, LABEL_WIDTH = 4, 150


@contextmanager
def _opened(source: str | Path | BinaryIO, name: str | None) -> Iterator[Image.Image]:
    """An image file, not yet decoded; whatever goes wrong with it inside the block becomes a ValueError that names it."""
    try:
        if isinstance(source, str | Path):
            check_plain(source)
        with Image.open(source, formats=FORMATS) as image:
            yield image
    except Exception as error:  # decoders let out whatever a damaged file makes them stumble over
        cause = str(error) if isinstance(error, OSError | ValueError) else repr(error)
        cause = re.sub(r"<[^<>]* at 0x[0-9a-f]+>", "it", cause)  # an open file's address would be new every time
        raise ValueError(f"{name or source} cannot be read as an image: {cause}") from error


def open_rgb(source: str | Path | BinaryIO, name: str | None = None, upright: bool = False) -> Image.Image:
    """An image as RGB: transparent parts on white, deeper grey scaled to 8 bits, of an animation the first frame.

    Args:
        source: path or open file.
        name: of the image, for the error; by default its path.
        upright: turn it by its EXIF orientation.

    Raises:
        ValueError: when it is missing, no file or cannot be decoded; the message names it.
    """
    with _opened(source, name) as image:
        image.load()
        if upright and (turn := TURNS.get(_orientation(image))) is not None:
            image = image.transpose(turn)
        if image.mode[0] in "IF":
            image = _eight_bits(image)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")


def image_size(path: str | Path, name: str | None = None, upright: bool = False) -> tuple[int, int]:
    """(width, height) in pixels; reads the header alone. Arguments and errors are those of `open_rgb`."""
    with _opened(path, name) as image:
        # Pillow decodes a whole PNG in search of a late EXIF block; it comes early if at all.
        asked = upright and (image.format != "PNG" or "exif" in image.info)
        turned = asked and _orientation(image) in QUARTER_TURNS
        if turned and image.format == "TIFF":  # which Pillow turns by itself, some versions not before they decode it
            image.load()
            return image.size
        return image.size[::-1] if turned else image.size


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation; 1, upright, when there is none that can be read.

    Pillow reads the tags in their order up to the first broken one, so this one is looked up before.
    """
    try:
        block = image.info.get("exif", b"").removeprefix(b"Exif\0\0")
        if order := {b"II": "<", b"MM": ">"}.get(block[:2]):
            (start,) = struct.unpack_from(f"{order}I", block, 4)
            (count,) = struct.unpack_from(f"{order}H", block, start)
            for place in range(start + 2, start + 2 + 12 * count, 12):
                tag, kind, _, value = struct.unpack_from(f"{order}HHIH", block, place)
                if (tag, kind) == (ExifTags.Base.Orientation, SHORT):
                    return value
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))  # in XMP or TIFF
    except Exception:  # as for pixels
        return 1


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 or 32 bits, or floating-point grey in [0, 1], [0, 255] or [0, 65535], in 8 bits.

    Files of 32 bits often hold 16, so that the range is that of the values.
    """
    pixels = np.asarray(image)
    low, high = pixels.min(), pixels.max()
    if image.mode == "F":
        white = next((white for white in (1, 255, 65535) if low >= 0 and high <= white), None)
        if white is None:
            raise ValueError(f"its floating-point pixels lie in [{low}, {high}] instead of [0, 1]; convert the image to 8 bits")
        return Image.fromarray((pixels * (255 / white)).round().astype(np.uint8))
    if low >= 0 and high <= 65535:
        return Image.fromarray((pixels // 256).astype(np.uint8))
    # Pillow reads unsigned numbers, TIFF's sample format 1, as signed ones too.
    signed = getattr(image, "tag_v2", {}).get(SAMPLE_FORMAT) == (2,)
    if signed and low < 0:
        raise ValueError(f"its pixels lie in [{low}, {high}]; convert the image to 8 bits")
    return Image.fromarray((pixels.view(np.uint32) >> (23 if signed else 24)).astype(np.uint8))


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """ADM's centre crop: halve by box filter while twice too large, bicubic to the shorter side, crop the middle."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    scaled = round(image.width * scale), round(image.height * scale)
    left, top = (scaled[0] - size) // 2, (scaled[1] - size) // 2
    if math.prod(scaled) > LARGE:  # long and thin: the same, without what would be cut off
        x, y = image.width / scaled[0], image.height / scaled[1]
        box = (left * x, top * y, (left + size) * x, (top + size) * y)
        return image.resize((size, size), Image.Resampling.BICUBIC, box=box)
    image = image.resize(scaled, Image.Resampling.BICUBIC)
    return image.crop((left, top, left + size, top + size))


def to_tensor(image: Image.Image) -> Tensor:
    """(3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.asarray(image, dtype=np.float32)).permute(2, 0, 1) / 127.5 - 1


def to_uint8(x: Tensor, truncate: bool = False) -> np.ndarray:
    """`to_pixels` as an array on the host."""
    return to_pixels(x, truncate).cpu().numpy()


def to_pixels(x: Tensor, truncate: bool = False) -> Tensor:
    """Images (B, C, H, W) in [-1, 1] to uint8 (B, H, W, 3): round(clamp(127.5 x + 127.5)); one channel becomes grey.

    Args:
        truncate: cut the fraction instead of rounding, as the published code does; half a level darker on average.
    """
    x = 127.5 * x.detach().float() + 127.5
    x = (x if truncate else x.round()).clamp(0, 255).to(torch.uint8)
    return (x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else x).permute(0, 2, 3, 1).contiguous()


def read_png(path: str | Path) -> np.ndarray:
    """uint8 (H, W, 3) of an image file, an array of its own."""
    return np.array(open_rgb(path))


def save_png(path: str | Path, pixels: np.ndarray) -> None:
    """Write uint8 (H, W, 3) so that the file is either whole or absent."""
    save_image(Path(path), pixels)


def save_image(path: Path, pixels: np.ndarray, png_level: int = PNG_LEVEL) -> None:
    """`save_png` in the format of the suffix; .jpg is written at Pillow's default quality, 75, as published scores are.

    Args:
        png_level: of zlib's compression, 0 (none) to 9; the pixels are the same.
    """
    with replacing(path) as partial:
        options = {"format": "JPEG"} if path.suffix == ".jpg" else {"format": "PNG", "compress_level": png_level}
        Image.fromarray(pixels).save(partial, **options)


def is_whole(path: Path) -> bool:
    """Whether an image is there to its end and, of a .png, its checksums hold; several times faster than decoding it."""
    if not path.is_file():  # opening a pipe would wait for its other end
        return False
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.format == "JPEG":  # knows no checksums, only a mark at its end
                return path.read_bytes()[-2:] == b"\xff\xd9"
            image.verify()
    except Exception:  # whatever a decoder raises
        return False
    return True


def shrink(image: Image.Image, side: int) -> Image.Image:
    """Scale down so that the longer side is at most `side`."""
    return image if max(image.size) <= side else scale_to(image, side)


def scale_to(image: Image.Image, side: int) -> Image.Image:
    """Scale so that the longer side is `side` pixels."""
    scale = side / max(image.size)
    return image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))), Image.Resampling.LANCZOS)


def make_grid(images: np.ndarray, columns: int, scale: int = 1, pad: int = 2) -> np.ndarray:
    """Tile uint8 images (B, H, W, 3) row by row on white, each pixel drawn scale x scale."""
    images = images.repeat(scale, axis=1).repeat(scale, axis=2)
    count, h, w, _ = images.shape
    rows = -(-count // columns)
    canvas = np.full((rows * (h + pad) + pad, columns * (w + pad) + pad, 3), 255, dtype=np.uint8)
    for k, image in enumerate(images):
        top, left = pad + (k // columns) * (h + pad), pad + (k % columns) * (w + pad)
        canvas[top : top + h, left : left + w] = image
    return canvas


def labelled_grid(
    rows: Sequence[Sequence[np.ndarray]], row_labels: Sequence[str], column_labels: Sequence[str], cell: int = 96
) -> np.ndarray:
    """Draw images row by row, each row with its label to the left and each column with its label above.

    Characters that no installed font has are drawn as boxes and warned of.

    Args:
        rows: uint8 images (H, W, 3) of any size; they are scaled to fit a cell, small ones by whole factors.
        cell: side of a cell in pixels.

    Returns:
        uint8 (H, W, 3).
    """
    fonts, line = find_fonts("".join(row_labels)), FONT_SIZE + 3
    wrapped = [wrap(label, max(1, cell // line)) for label in row_labels]
    top = PAD + line
    canvas = Image.new(
        "RGB", (LABEL_WIDTH + len(column_labels) * (cell + PAD) + PAD, top + len(rows) * (cell + PAD) + PAD), "white"
    )
    draw = ImageDraw.Draw(canvas)
    for column, label in enumerate(column_labels):
        draw.text((LABEL_WIDTH + column * (cell + PAD) + cell / 2, PAD), label, fill="black", font=label_font(), anchor="ma")
    for k, (images, lines) in enumerate(zip(rows, wrapped, strict=True)):
        y = top + k * (cell + PAD)
        middle = y + (cell - line * len(lines)) / 2
        for number, text in enumerate(lines):
            draw_to_the_left(draw, (LABEL_WIDTH - 2 * PAD, middle + number * line), text, fonts)
        for column, pixels in enumerate(images):
            image = _fit_cell(pixels, cell)
            x = LABEL_WIDTH + column * (cell + PAD)
            canvas.paste(image, (x + (cell - image.width) // 2, y + (cell - image.height) // 2))
    return np.asarray(canvas)


def _fit_cell(pixels: np.ndarray, cell: int) -> Image.Image:
    """Scale to fit: up by the largest whole factor, or down."""
    image = Image.fromarray(pixels)
    factor = cell // max(image.size)
    if factor >= 1:
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    return scale_to(image, cell)
