"""Pixels: files to arrays, arrays to files, arrays to grids."""

import logging
import struct
import textwrap
import unicodedata
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from tim.files import replacing

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
# What Pillow raises for files that are missing, cut short, not images or too large to be honest.
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)
PAD, LABEL_WIDTH, LABEL_CHARACTERS, WIDE_CHARACTERS, FONT_SIZE = 4, 150, 17, 10, 13
Fonts = dict[str, ImageFont.FreeTypeFont]  # by character
logger = logging.getLogger(__name__)


def open_rgb(source: str | Path | BinaryIO, name: str | None = None, upright: bool = False) -> Image.Image:
    """An image as RGB: transparent parts on white, 16-bit grey scaled to 8, of an animation the first frame.

    Args:
        source: path or open file.
        name: of the image, for the error; by default its path.
        upright: turn it by its EXIF orientation.

    Raises:
        ValueError: when it is missing or cannot be decoded; the message names it.
    """
    try:
        with Image.open(source) as opened:
            image = ImageOps.exif_transpose(opened) if upright else opened
            if image.mode.startswith("I"):  # 16 bits, which Pillow would clip at 255
                image = _eight_bits(image)
            if image.mode == "F":
                raise ValueError("floating-point pixels have no agreed range; convert the image to 8 bits")
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")
    except UNREADABLE as error:
        cause = str(error).replace(repr(source), "it")  # Pillow names an open file by its address, new every time
        raise ValueError(f"{name or source} cannot be read as an image: {cause}") from error


def _eight_bits(image: Image.Image) -> Image.Image:
    """The upper byte of 16-bit grey."""
    pixels = np.asarray(image)
    if pixels.min() < 0 or pixels.max() > 65535:
        raise ValueError(f"its pixels lie in [{pixels.min()}, {pixels.max()}] instead of 16 bits; convert the image to 8 bits")
    return Image.fromarray((pixels // 256).astype(np.uint8))


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """ADM's centre crop: halve by box filter while twice too large, bicubic to the shorter side, crop the middle."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def to_tensor(image: Image.Image) -> Tensor:
    """(3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.asarray(image, dtype=np.float32)).permute(2, 0, 1) / 127.5 - 1


def to_uint8(x: Tensor, truncate: bool = False) -> np.ndarray:
    """Images (B, C, H, W) in [-1, 1] to uint8 (B, H, W, 3): round(clamp(127.5 x + 127.5)); one channel becomes grey.

    Args:
        truncate: cut the fraction instead of rounding, as the published code does; half a level darker on average.
    """
    x = 127.5 * x.detach().float().cpu() + 127.5
    x = (x if truncate else x.round()).clamp(0, 255).to(torch.uint8)
    return (x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else x).permute(0, 2, 3, 1).numpy()


def read_png(path: str | Path) -> np.ndarray:
    """uint8 (H, W, 3) of an image file, an array of its own."""
    return np.array(open_rgb(path))


def save_png(path: str | Path, pixels: np.ndarray) -> None:
    """Write uint8 (H, W, 3) so that the file is either whole or absent."""
    save_image(Path(path), pixels)


def save_image(path: Path, pixels: np.ndarray) -> None:
    """`save_png` in the format of the suffix; .jpg is written at Pillow's default quality, 75, as published scores are."""
    with replacing(path) as partial:
        Image.fromarray(pixels).save(partial, format="JPEG" if path.suffix == ".jpg" else "PNG")


def is_whole(path: Path) -> bool:
    """Whether an image is there to its end and, of a .png, its checksums hold; several times faster than decoding it."""
    if not path.is_file():  # opening a pipe would wait for its other end
        return False
    try:
        with Image.open(path) as image:
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
    fonts, line = _label_fonts("".join(row_labels)), FONT_SIZE + 3
    wrapped = [_wrap(label, max(1, cell // line)) for label in row_labels]
    top = PAD + line
    canvas = Image.new(
        "RGB", (LABEL_WIDTH + len(column_labels) * (cell + PAD) + PAD, top + len(rows) * (cell + PAD) + PAD), "white"
    )
    draw = ImageDraw.Draw(canvas)
    for column, label in enumerate(column_labels):
        draw.text((LABEL_WIDTH + column * (cell + PAD) + cell / 2, PAD), label, fill="black", font=_label_font(), anchor="ma")
    for k, (images, lines) in enumerate(zip(rows, wrapped, strict=True)):
        y = top + k * (cell + PAD)
        middle = y + (cell - line * len(lines)) / 2
        for number, text in enumerate(lines):
            _draw_to_the_left(draw, (LABEL_WIDTH - 2 * PAD, middle + number * line), text, fonts)
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


def _wrap(label: str, lines: int) -> list[str]:
    """Lines of a label; characters of East Asia are twice as wide as others."""
    is_wide = any(unicodedata.east_asian_width(c) in "WF" for c in label)
    return textwrap.wrap(label, WIDE_CHARACTERS if is_wide else LABEL_CHARACTERS, max_lines=lines, placeholder="…")


def _draw_to_the_left(draw: ImageDraw.ImageDraw, corner: tuple[float, float], text: str, fonts: Fonts) -> None:
    """Draw a line of text that ends at its upper right corner, each run of characters in its font."""
    (x, y), own = corner, _label_font()
    runs: list[tuple[ImageFont.FreeTypeFont, str]] = []
    for c in text:
        font = fonts.get(c, own)
        if runs and (font is runs[-1][0] or _is_mark(c)):
            font, before = runs.pop()
            c = before + c
        runs.append((font, c))
    for font, run in reversed(runs):
        draw.text((x, y + own.getmetrics()[0]), run, fill="black", font=font, anchor="rs")
        x -= font.getlength(run)


def _is_mark(character: str) -> bool:
    """Whether a character has no place of its own: accents and vowel signs, joiners, selectors."""
    return unicodedata.category(character)[0] == "M" or unicodedata.category(character) in ("Cc", "Cf")


@lru_cache(maxsize=1)
def _label_font() -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(_dejavu(), FONT_SIZE)


def _dejavu() -> str:
    """File of DejaVu Sans, which ships with matplotlib and knows most alphabets."""
    import matplotlib

    return str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf")


def _label_fonts(text: str) -> Fonts:
    """Installed fonts of the characters that DejaVu Sans lacks; those without any are warned of."""
    from matplotlib.font_manager import findSystemFonts
    from matplotlib.ft2font import FT2Font

    missing = {c for c in text if not (c.isspace() or _is_mark(c))} - set(map(chr, FT2Font(_dejavu()).get_charmap()))
    fonts: Fonts = {}
    for path in sorted(findSystemFonts()) if missing else []:
        with suppress(OSError, RuntimeError):  # bitmap fonts come in other sizes
            if found := missing & set(map(chr, FT2Font(path).get_charmap())):
                fonts |= dict.fromkeys(found, ImageFont.truetype(path, FONT_SIZE))
                missing -= found
    if missing:
        shown = " ".join(sorted(missing)[:30])
        logger.warning("no installed font has %s; labels show boxes (fonts-noto has all)", shown)
    return fonts


def list_images(folder: Path) -> Sequence[Path]:
    """Image files of one folder, sorted by name."""
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
