"""Labels of grids: lines of text in the fonts that have their characters."""

import logging
import textwrap
import unicodedata
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from PIL import ImageDraw, ImageFont

CHARACTERS, WIDE_CHARACTERS, FONT_SIZE = 17, 10, 13  # of a line
Fonts = dict[str, ImageFont.FreeTypeFont]  # by character

logger = logging.getLogger(__name__)


def wrap(label: str, lines: int) -> list[str]:
    """Lines of a label; characters of East Asia are twice as wide as others."""
    is_wide = any(unicodedata.east_asian_width(c) in "WF" for c in label)
    return textwrap.wrap(label, WIDE_CHARACTERS if is_wide else CHARACTERS, max_lines=lines, placeholder="…")


def draw_to_the_left(draw: ImageDraw.ImageDraw, corner: tuple[float, float], text: str, fonts: Fonts) -> None:
    """Draw a line of text that ends at its upper right corner, each run of characters in its font."""
    (x, y), own = corner, label_font()
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
def label_font() -> ImageFont.FreeTypeFont:
    """DejaVu Sans in the size of labels."""
    return ImageFont.truetype(_dejavu(), FONT_SIZE)


def _dejavu() -> str:
    """File of DejaVu Sans, which ships with matplotlib and knows most alphabets."""
    import matplotlib

    return str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf")


def find_fonts(text: str) -> Fonts:
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
