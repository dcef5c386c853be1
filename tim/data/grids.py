"""Pictures with captions: grids whose rows and columns are labelled."""

import textwrap
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from tim.data.images import scale_to

PAD, LABEL_WIDTH, LABEL_CHARACTERS, FONT_SIZE = 4, 150, 17, 13


def labelled_grid(
    rows: Sequence[Sequence[np.ndarray]], row_labels: Sequence[str], column_labels: Sequence[str], cell: int = 96
) -> np.ndarray:
    """Draw pictures row by row, each row with its label to the left and each column with its label above.

    Args:
        rows: uint8 pictures (H, W, 3) of any size; they are scaled to fit a cell, small ones by whole factors.
        cell: side of a cell in pixels.

    Returns:
        uint8 (H, W, 3).
    """
    font, line = _font(), FONT_SIZE + 3
    wrapped = [textwrap.wrap(label, LABEL_CHARACTERS, max_lines=max(1, cell // line), placeholder="…") for label in row_labels]
    top = PAD + line
    canvas = Image.new(
        "RGB", (LABEL_WIDTH + len(column_labels) * (cell + PAD) + PAD, top + len(rows) * (cell + PAD) + PAD), "white"
    )
    draw = ImageDraw.Draw(canvas)
    for column, label in enumerate(column_labels):
        draw.text((LABEL_WIDTH + column * (cell + PAD) + cell / 2, PAD), label, fill="black", font=font, anchor="ma")
    for k, (pictures, lines) in enumerate(zip(rows, wrapped, strict=True)):
        y = top + k * (cell + PAD)
        middle = y + (cell - line * len(lines)) / 2
        for number, text in enumerate(lines):
            draw.text((LABEL_WIDTH - 2 * PAD, middle + number * line), text, fill="black", font=font, anchor="ra")
        for column, picture in enumerate(pictures):
            image = _fit(picture, cell)
            x = LABEL_WIDTH + column * (cell + PAD)
            canvas.paste(image, (x + (cell - image.width) // 2, y + (cell - image.height) // 2))
    return np.asarray(canvas)


def _fit(picture: np.ndarray, cell: int) -> Image.Image:
    """Scale to fit: up by the largest whole factor, or down."""
    image = Image.fromarray(picture)
    factor = cell // max(image.size)
    if factor >= 1:
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    return scale_to(image, cell)


@lru_cache(maxsize=1)
def _font() -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which ships with matplotlib and knows most scripts."""
    import matplotlib

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), FONT_SIZE)
