"""Pictures of every kind are read or named, odd shapes are cropped; labelled grids keep pixels and labels inside."""

import io
import resource
import struct

import numpy as np
import pytest
from PIL import Image

from tim import images
from tim.data.t2i import fit
from tim.images import LABEL_WIDTH, PAD, center_crop, image_size, labelled_grid, open_rgb


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


@pytest.mark.parametrize(
    "error",
    [TypeError, AttributeError, KeyError, struct.error, SyntaxError, RecursionError, MemoryError, Image.DecompressionBombError],
)
def test_whatever_a_decoder_lets_out_is_one_unreadable_image(tmp_path, monkeypatch, error):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")

    def fail(*_):
        raise error("its own words")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", fail)
    with pytest.raises(ValueError, match=r"a\.png cannot be read as an image: .*its own words"):
        open_rgb(tmp_path / "a.png")


def exif_of(orientation, order):
    """An EXIF block with an orientation, among tags that lie about where their values are and of what type."""
    own = orientation << 16 if order == ">" else orientation  # a number of 16 bits stands at the left
    entries = [(0x010E, 2, 100, 0x7FFFFFFF), (0x0112, 3, 1, own), (0x8769, 13, 3, 0xFFFFFFF0), (0xA005, 77, 5, 9)]
    packed = b"".join(struct.pack(f"{order}HHII", *entry) for entry in entries)
    head = struct.pack(f"{order}HIH", 42, 8, len(entries))
    return b"Exif\0\0" + (b"MM" if order == ">" else b"II") + head + packed + struct.pack("<I", 0xFFFFFFFF)


@pytest.mark.parametrize("kind,order", [("JPEG", "<"), ("PNG", ">"), ("WEBP", "<"), ("JPEG", ">")])
def test_only_the_orientation_of_exif_matters(tmp_path, kind, order):
    """Where the red corner of a picture is after each turn, whatever else is wrong in the block."""
    picture = Image.new("RGB", (48, 32), "blue")
    picture.paste("red", (0, 0, 16, 16))
    corners = {1: (0, 0), 2: (1, 0), 3: (1, 1), 4: (0, 1), 5: (0, 0), 6: (1, 0), 7: (1, 1), 8: (0, 1)}
    for orientation, (right, low) in corners.items():
        path = tmp_path / f"{orientation}.{kind.lower()}"
        picture.save(path, kind, exif=exif_of(orientation, order), **({} if kind == "PNG" else {"quality": 95}))
        turned = open_rgb(path, upright=True)
        assert turned.size == image_size(path, upright=True) == ((32, 48) if orientation > 4 else (48, 32))
        red, _, blue = turned.getpixel((right * (turned.width - 1), low * (turned.height - 1)))
        assert red > 200 and blue < 60, orientation
        assert open_rgb(path).getpixel((0, 0))[0] > 200 and image_size(path) == (48, 32)
    turned = Image.Exif()
    turned[0x0112] = 6
    picture.save(tmp_path / "a.tif", exif=turned)  # which Pillow turns by itself
    assert open_rgb(tmp_path / "a.tif", upright=True).size == image_size(tmp_path / "a.tif", upright=True) == (32, 48)
    picture.save(tmp_path / "garbage.jpg", exif=b"Exif\0\0garbage")
    assert open_rgb(tmp_path / "garbage.jpg", upright=True).size == image_size(tmp_path / "garbage.jpg", upright=True)


@pytest.mark.parametrize("size", [(1, 60000), (60000, 2), (3, 20000), (1, 1), (65000, 1)])
def test_long_and_thin_pictures_are_cropped_in_little_memory(size):
    ramp = np.linspace(0, 255, max(size)).round().astype(np.uint8)
    picture = Image.fromarray(ramp.reshape(size[::-1]) if 1 in size else np.broadcast_to(
        ramp[:, None] if size[0] < size[1] else ramp, size[::-1]).copy()).convert("RGB")  # fmt: skip
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    square = np.asarray(center_crop(picture, 256)).astype(int)
    assert square.shape == (256, 256, 3) and np.abs(square - square.mean()).max() <= 2, "the middle of a slow ramp"
    if size != (1, 1):
        assert abs(square.mean() - 127.5) < 2
    for how in ("crop", "squash"):
        assert fit(picture, 32, 64, how).size == (64, 32)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000, "KiB"


@pytest.mark.parametrize("size", [(300, 200), (97, 341), (500, 40)])
def test_the_crop_of_long_pictures_is_that_of_others(size, monkeypatch):
    g = np.random.default_rng(0)
    picture = Image.fromarray(g.integers(0, 255, (*size[::-1], 3), dtype=np.uint8))
    whole = np.asarray(center_crop(picture, 64)).astype(int)
    monkeypatch.setattr(images, "LARGE", 0)
    assert np.abs(np.asarray(center_crop(picture, 64)) - whole).max() <= 1


def test_what_is_named_as_an_image_starts_no_other_program(tmp_path, monkeypatch):
    """PostScript would be drawn by Ghostscript."""
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_: pytest.fail("Ghostscript was asked"), raising=False)
    with pytest.raises(ValueError, match=r"a\.png cannot be read as an image: cannot identify"):
        open_rgb(tmp_path / "a.png")


def test_a_cause_reads_the_same_every_time():
    causes = set()
    for _ in range(2):
        with pytest.raises(ValueError, match="cannot be read") as caught:
            open_rgb(io.BytesIO(b"no image"), "a.png")
        causes.add(str(caught.value))
    assert len(causes) == 1
