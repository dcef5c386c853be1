"""Captioned images in buckets: real photographs and drawn shapes, written in the published format."""

import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from tim import rng
from tim.config import Data, Dataset
from tim.data.registry import build_t2i_dataset
from tim.data.t2i import CaptionedImages, fit
from tim.images import open_rgb

CAPTIONS = [["a red flower", "eine rote Blüte"], ["a Chinese temple 寺"], ["a small flower"]]


def line(image_file="0.png", bucket="photo-set-70x100", captions=("a flower",)):
    return {"image_file": image_file, "bucket": bucket, "captions": list(captions)}


def write(folder, lines, batches):
    """Write the two files; str lines go in as they are."""
    text = "".join((entry if isinstance(entry, str) else json.dumps(entry, ensure_ascii=False)) + "\n" for entry in lines)
    (folder / "data_info.jsonl").write_bytes(text.encode("utf-8", "surrogatepass"))
    (folder / "bucket_sampler.json").write_text(batches if isinstance(batches, str) else json.dumps(batches))
    return folder


def dataset(folder, **kwargs):
    files = (folder, folder / "data_info.jsonl", folder / "bucket_sampler.json")
    return CaptionedImages(*map(str, files), **kwargs)


@pytest.fixture
def photos(tmp_path):
    """Three pictures of 427x640: two of bucket 70x100 and one of 100x70; the third has the size of the first."""
    flower, temple = load_sample_images().images[::-1]
    for number, picture in enumerate((flower, temple, flower[:200])):
        Image.fromarray(picture).save(tmp_path / f"{number}.png")
    buckets = ["photo-set-70x100", "100x70", "other-64x96"]
    lines = [line(f"{n}.png", buckets[n], CAPTIONS[n]) for n in range(3)]
    return write(tmp_path, lines, [[2, 0], [1]])


def test_samples_have_the_floored_size_of_their_bucket(photos):
    data = dataset(photos)
    assert len(data) == 3 and [b.tolist() for b in data.batches] == [[2, 0], [1]]
    assert [data.size(i) for i in range(3)] == [(64, 96), (96, 64), (64, 96)]
    for index in range(3):
        image = data.load(index, rng.generator(0, "data"))["image"]
        assert image.shape == (3, *data.size(index)) and image.dtype == torch.float32
        assert -1 <= image.min() < -0.3 and 0.3 < image.max() <= 1
    write(photos, [line(bucket="a-70x100")], [[0]])
    assert [dataset(photos, factor=f).size(0) for f in (8, 10, 64)] == [(64, 96), (70, 100), (64, 64)]


def test_captions_are_drawn_evenly_by_the_generator_and_stay_unicode(photos):
    data = dataset(photos)
    drawn = [data.load(0, rng.generator(0, "data", step))["caption"] for step in range(60)]
    assert set(drawn) == set(CAPTIONS[0]) and 15 < drawn.count(CAPTIONS[0][0]) < 45
    assert drawn == [data.load(0, rng.generator(0, "data", step))["caption"] for step in range(60)]
    assert data.load(1, rng.generator(0, "data"))["caption"] == "a Chinese temple 寺"


def test_peers_share_the_size_and_are_packed(photos):
    data = dataset(photos)
    assert data.peers(0).tolist() == data.peers(2).tolist() == [0, 2] and data.peers(1).tolist() == [1]
    write(photos, [line()] * 4, [[3, 1, 3]])
    assert dataset(photos).peers(0).tolist() == [1, 3], "lines that no batch names do not stand in"


def test_an_unreadable_image_is_named_and_loads_when_mended(photos):
    data = dataset(photos)
    whole = (photos / "0.png").read_bytes()
    for content in (whole[: len(whole) // 2], b"no image", b""):
        (photos / "0.png").write_bytes(content)
        with pytest.raises(ValueError, match=r"0\.png cannot be read"):
            data.load(0, rng.generator(0, "data"))
    (photos / "0.png").unlink()
    with pytest.raises(ValueError, match=r"0\.png cannot be read"):
        data.load(0, rng.generator(0, "data"))
    (photos / "0.png").write_bytes(whole)
    assert data.load(0, rng.generator(0, "data"))["image"].shape == (3, 64, 96)


def test_workers_can_hold_it_and_a_line_costs_little(photos):
    write(photos, [line(captions=["a long caption " * 20])] * 5000, [[0, 4999]])
    data = dataset(photos)
    assert len(pickle.dumps(data)) < 5000 * 16 + 4000
    assert data.load(4999, rng.generator(0, "data"))["caption"].startswith("a long caption")


def test_crop_keeps_the_aspect_ratio_and_squash_the_whole_picture():
    ramp = Image.fromarray(np.tile(np.arange(256, dtype=np.uint8), (64, 1)))  # grey value = column
    cropped, squashed = (np.asarray(fit(ramp, 64, 64, how)).astype(int) for how in ("crop", "squash"))
    assert np.array_equal(cropped, np.asarray(ramp)[:, 96:160]), "the middle, unscaled"
    expected = np.arange(64) * 4 + 1.5
    assert np.abs(squashed[:, 2:-2] - expected[2:-2]).max() <= 1, "all of it, averaged"
    tall = np.asarray(fit(ramp.transpose(Image.Transpose.ROTATE_270), 64, 64, "crop"))
    assert np.array_equal(tall, np.asarray(ramp)[:, 96:160].T)
    enlarged = np.asarray(fit(ramp, 128, 128, "crop"))
    assert enlarged.shape == (128, 128) and np.abs(enlarged[:, 64].astype(int) - 128).max() <= 1


@pytest.mark.parametrize("size", [(1, 500), (500, 1), (37, 1023), (640, 427), (3, 2), (4000, 31)])
def test_odd_aspect_ratios_fill_the_size(size):
    for shape in ((32, 64), (96, 32)):
        for how in ("crop", "squash"):
            assert np.asarray(fit(Image.new("RGB", size, "red"), *shape, how)).tolist() == [[[255, 0, 0]] * shape[1]] * shape[0]


def test_shrinking_does_not_alias():
    board = Image.fromarray((np.indices((1024, 1024)).sum(0) % 2 * 255).astype(np.uint8))
    assert np.ptp(np.asarray(fit(board, 32, 32, "crop")).astype(int)) <= 2, "a checkerboard averages to grey"


def test_transparency_lies_on_white(tmp_path):
    rgba = Image.new("RGBA", (4, 2), (0, 0, 0, 0))
    rgba.putpixel((0, 0), (255, 0, 0, 255))
    rgba.putpixel((1, 0), (0, 0, 0, 128))
    for name in ("rgba.png", "rgba.webp"):
        rgba.save(tmp_path / name, **({"lossless": True} if name.endswith("webp") else {}))
        pixels = np.asarray(open_rgb(tmp_path / name, upright=True))
        assert pixels[0, 0].tolist() == [255, 0, 0] and pixels[0, 1].tolist() == [127] * 3 and pixels[1].min() == 255
    Image.new("LA", (2, 2), (10, 0)).save(tmp_path / "la.png")
    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([0, 0, 0, 0, 0, 255])
    palette.save(tmp_path / "p.png", transparency=1)
    for name in ("la.png", "p.png"):
        assert np.asarray(open_rgb(tmp_path / name, upright=True)).min() == 255
    palette.save(tmp_path / "opaque.png")
    assert np.asarray(open_rgb(tmp_path / "opaque.png", upright=True))[0, 0].tolist() == [0, 0, 255]


def test_pictures_stand_upright(tmp_path):
    halves = Image.fromarray(np.repeat(np.array([[0, 255]], np.uint8), 32, 0).repeat(32, 1))  # left black, right white
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held a quarter turn: show it turned clockwise
    halves.save(tmp_path / "turned.jpg", exif=exif)
    pixels = np.asarray(open_rgb(tmp_path / "turned.jpg", upright=True))
    assert pixels.shape == (64, 32, 3) and pixels[:24].max() < 20 and pixels[-24:].min() > 235


def test_sixteen_bit_grey_keeps_its_range(tmp_path):
    Image.fromarray(np.array([[0, 32768, 65535]], np.uint16)).save(tmp_path / "deep.png")
    assert np.asarray(open_rgb(tmp_path / "deep.png", upright=True))[0, :, 0].tolist() == [0, 128, 255]


@pytest.mark.parametrize(
    "bad,match",
    [
        ("{not json", r"line 2: .*property name"),
        ("", "line 2: .*blank line"),
        ("[1, 2]", "line 2: expected a JSON object, got list"),
        ({"image_file": "0.png", "bucket": "a-64x64"}, "line 2: key 'captions' is missing"),
        ({"image_file": "0.png", "captions": ["a"]}, "line 2: key 'bucket' is missing"),
        ({"bucket": "a-64x64", "captions": ["a"]}, "line 2: key 'image_file' is missing"),
        (line(captions=[]), "line 2: captions must be"),
        (line(captions=["a", 3]), r"line 2: captions must be .*3"),
        ({**line(), "captions": "a flower"}, "line 2: captions must be"),
        ('{"image_file": "0.png", "bucket": "a-64x64", "captions": ["\\ud800"]}', "line 2: .*surrogate"),
        (line(image_file=""), "line 2: image_file"),
        (line(image_file="../../x.png"), r"line 2: '\.\./\.\./x\.png' leads outside the folder"),
        (line(image_file="/etc/x.png"), "line 2: '/etc/x.png' leads outside the folder"),
        (line(image_file="a" * 256), "line 2: 'aaa.* is no name that a file can have"),
        ("[" * 100_000, "line 2: it is nested too deeply"),
        (line(bucket="a-100000x100000"), "line 2: bucket .* has more than"),
        (line(bucket=f"a-{'9' * 5000}x1"), "line 2: "),
        (line(bucket="a-64"), "line 2: bucket 'a-64' is not of the form name-HxW"),
        (line(bucket="a-64x64x64"), "line 2: bucket"),
        (line(bucket="a-64x31"), "line 2: bucket 64x31 has a side below 32"),
    ],
)
def test_malformed_lines_are_named(tmp_path, bad, match):
    write(tmp_path, [line(), bad, line()], [[0]])
    with pytest.raises(ValueError, match=match):
        dataset(tmp_path)


def test_a_byte_order_mark_is_no_part_of_the_data(photos):
    for name in ("data_info.jsonl", "bucket_sampler.json"):
        (photos / name).write_bytes(b"\xef\xbb\xbf" + (photos / name).read_bytes())
    assert dataset(photos).load(0, rng.generator(0, "data"))["caption"] in CAPTIONS[0]


def test_bytes_that_are_not_utf8_are_named(tmp_path):
    write(tmp_path, [line()], [[0]])
    with open(tmp_path / "data_info.jsonl", "ab") as f:
        f.write(b'{"image_file": "\xff"}\n')
    with pytest.raises(ValueError, match=r"data_info\.jsonl line 2: .*utf-8"):
        dataset(tmp_path)


@pytest.mark.parametrize(
    "batches,match",
    [
        ("[[0, 1", "is no JSON"),
        ("[" * 100_000, "is no JSON: it is nested too deeply"),
        ([], "at least one batch"),
        ({"0": [0]}, "at least one batch"),
        ([[0], []], r"batch 1 .* bucket that names no line"),
        ([[0], [0, 3]], r"batch 1 .* names line 3; the jsonl has lines 0 to 2"),
        ([[-1]], "names line -1"),
        ([[0, "1"]], "must be a list of line numbers"),
        ([[True]], "must be a list of line numbers"),
        ([0, 1], r"batch 0 .*must be a list of line numbers"),
        ([[0, 2]], "mixes buckets of the sizes 64x96, 96x64"),
    ],
)
def test_malformed_batches_are_named(tmp_path, batches, match):
    write(tmp_path, [line(), line(), line(bucket="a-96x64")], batches)
    with pytest.raises(ValueError, match=match):
        dataset(tmp_path)


def test_missing_files_and_keys_are_named(photos):
    given = {"root_dir": photos, "jsonl_dir": photos / "data_info.jsonl", "packed_json": photos / "bucket_sampler.json"}
    given = {key: str(path) for key, path in given.items()}
    data = build_t2i_dataset(Data("image_ms", Dataset(**given, resize="squash")), factor=8)
    assert data.size(0) == (64, 96) and data.resize == "squash"
    for key in given:
        with pytest.raises(ValueError, match=rf"data\.dataset\.{key}"):
            build_t2i_dataset(Data("image_ms", Dataset(**{**given, key: None})), factor=32)
        with pytest.raises(FileNotFoundError, match=rf"absent.*data\.dataset\.{key}"):
            build_t2i_dataset(Data("image_ms", Dataset(**{**given, key: str(photos / "absent")})), factor=32)
    with pytest.raises(ValueError, match="'latent' is not text-to-image"):
        build_t2i_dataset(Data("latent", Dataset(**given)), factor=32)
    with pytest.raises(ValueError, match="'stretch'"):
        dataset(photos, resize="stretch")
    (photos / "data_info.jsonl").write_text("")
    with pytest.raises(ValueError, match="is empty"):
        dataset(photos)
