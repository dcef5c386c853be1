"""Labels of grids: every script that has a font, and lines that stay inside."""

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib import font_manager

from tim.images import LABEL_WIDTH, labelled_grid


def test_labels_take_characters_from_other_fonts_and_say_which_no_font_has(monkeypatch, caplog):
    """A character that matplotlib's second font has and its first, DejaVu, has not; and one that none has."""
    picture, fonts = np.zeros((8, 8, 3), np.uint8), Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    monkeypatch.setattr(font_manager, "findSystemFonts", list)
    boxes = labelled_grid([[picture]], ["a \ue000 狐"], ["x"])
    assert "no installed font has 狐 \ue000" in caplog.text
    caplog.clear()
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: [str(fonts / "STIXNonUni.ttf")])
    found = labelled_grid([[picture]], ["a \ue000 狐"], ["x"])
    assert "no installed font has 狐;" in caplog.text and (found != boxes).any()


def test_wide_characters_break_into_lines_sooner():
    """Seventeen letters are a line, as many characters of East Asia two."""

    def lines(label) -> int:
        ink = (labelled_grid([[np.zeros((96, 96, 3), np.uint8)]], [label], [""])[:, :LABEL_WIDTH] != 255).any((1, 2))
        return int((np.diff(ink.astype(int)) == 1).sum())

    assert lines("n" * 17) == 1 and lines("\u72d0" * 17) == 2
