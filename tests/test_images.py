"""Labelled grids: pictures keep their pixels, labels stay inside."""

import numpy as np

from tim.images import LABEL_WIDTH, PAD, labelled_grid


def test_pictures_of_any_size_fit_their_cells_and_long_labels_stay_inside():
    small = np.zeros((24, 40, 3), np.uint8)
    large = np.full((300, 200, 3), 7, np.uint8)
    labels = ["short", "a very long prompt about mushrooms that goes on and on " * 5]
    grid = labelled_grid([[small, large], [large, small]], labels, ["1 step", "4 steps"], cell=96)
    assert grid.shape[1] == LABEL_WIDTH + 2 * (96 + PAD) + PAD
    assert (grid[:, :2] == 255).all(), "a label runs over the left edge"
    cell = grid[:, LABEL_WIDTH : LABEL_WIDTH + 96]
    assert (cell == 0).all(-1).sum() >= 48 * 80  # 24x40 drawn twice as large, untouched by smoothing
    assert (labelled_grid([[small]], [""], ["x"]) != 255).any()
