"""The rule that judges coloured shapes: on the real pictures, and on what a failing model draws."""

import numpy as np
import pytest
from PIL import Image

from tim.demo.shapes import detect, score


def real_pictures(size, every=3):
    from tim.demo.data import read_shapes

    samples = (read_shapes("train")[::9] + read_shapes("test"))[::every]
    images = []
    for path, _, _ in samples:
        with Image.open(path) as image:
            images.append(np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)))
    return np.stack(images), [f"a {color} {shape}" for _, shape, color in samples]


@pytest.mark.parametrize(("size", "shape_accuracy"), [(64, 0.99), (32, 0.97)])
def test_real_pictures_are_recognised(size, shape_accuracy):
    images, prompts = real_pictures(size)
    result = score(images, prompts)
    assert result["n"] == len(prompts) > 300
    assert result["color"] > 0.99
    assert result["shape"] > shape_accuracy
    assert result["both"] <= min(result["color"], result["shape"])


def test_wrong_prompts_score_at_chance():
    images, prompts = real_pictures(32)
    shuffled = [prompts[k] for k in np.random.default_rng(0).permutation(len(prompts))]
    result = score(images, shuffled)
    assert result["color"] == pytest.approx(1 / 8, abs=0.07)
    assert result["shape"] == pytest.approx(1 / 3, abs=0.09)


def test_tables_count_what_was_seen_instead():
    image = np.full((32, 32, 3), 240, dtype=np.uint8)
    image[8:20, 6:24] = (255, 0, 0)
    empty = np.full_like(image, 240)
    result = score(np.stack([image, image, empty]), ["a red rectangle", "a teal circle", "a red rectangle"])
    assert (result["color"], result["shape"], result["both"]) == (1 / 3, 1 / 3, 1 / 3)
    assert result["colors"]["red"] == {"n": 2, "accuracy": 0.5, "seen": {"red": 1, "none": 1}}
    assert result["shapes"]["circle"] == {"n": 1, "accuracy": 0.0, "seen": {"rectangle": 1}}


def test_noise_and_plain_pictures_show_no_shape():
    assert detect(np.full((32, 32, 3), 240, dtype=np.uint8)) == (None, None)
    noise = np.random.default_rng(0).integers(0, 256, (50, 32, 32, 3), dtype=np.uint8)
    assert all(detect(image)[0] is None for image in noise)


def test_a_broken_outline_keeps_its_colour_and_loses_its_shape():
    image = np.full((64, 64, 3), 240, dtype=np.uint8)
    image[10:40, 10:40] = (0, 128, 128)
    image[13:37, 13:37] = 240
    assert detect(image) == (None, "teal")


def test_unusable_prompts_are_refused():
    image = np.zeros((1, 32, 32, 3), dtype=np.uint8)
    with pytest.raises(ValueError, match="'a pink circle' must name one of black"):
        score(image, ["a pink circle"])
    with pytest.raises(ValueError, match="1 images need as many prompts"):
        score(image, ["a red circle", "a red circle"])
