"""Images of a prompt side by side in one file, and how they are cut apart again."""

import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from tim.evaluation.inputs import SHOWN


def grid_side(pic_num: int) -> int:
    """Images along a side of the grid.

    Raises:
        ValueError: when `pic_num` is no square.
    """
    side = math.isqrt(max(pic_num, 0))
    if side < 1 or side**2 != pic_num:
        raise ValueError(f"--pic-num must be a square (1, 4, 9, ...), as images form a square grid; got {pic_num}")
    return side


def check_grids(files: Sequence[Path], side: int, resolution: int | None = None) -> None:
    """Make sure that every image can be cut into side x side equal parts; reads headers only.

    Args:
        resolution: pixels along each side of a part, None for whatever the image gives.

    Raises:
        ValueError: names the images that cannot, or that cannot be read.
    """
    wrong = []
    for path in files:
        try:
            with Image.open(path) as image:
                width, height = image.size
        except OSError as error:
            raise ValueError(f"{path} cannot be read as an image: {error}") from error
        whole = (resolution * side,) * 2 if resolution else (width // side * side, height // side * side)
        if (width, height) != whole or not width or not height:
            wrong.append(f"{path} ({width}x{height})")
    if wrong:
        of = f" of {resolution}x{resolution}" if resolution else ""
        more = f" and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        raise ValueError(f"not {side}x{side} equal images{of} (--pic-num, --resolution): {', '.join(wrong[:SHOWN])}{more}")


def cut_grid(image: Image.Image, side: int) -> list[Image.Image]:
    """The side x side images of a grid, row by row."""
    width, height = image.width // side, image.height // side
    corners = [(column * width, row * height) for row in range(side) for column in range(side)]
    return [image.crop((x, y, x + width, y + height)) for x, y in corners]
