"""Retrieval: the classifier is loaded right, real pictures find themselves, unrelated ones are at chance."""

import numpy as np
import pytest
import torch

from tim.demo.retrieval import cell_colors, image_features, rank_report
from tim.evaluation.features import efficientnet, preprocess


@pytest.fixture(scope="module")
def emoji_pictures():
    from tim.demo.data import nature
    from tim.images import scale_to

    pictures = [scale_to(image, 32) for number, (_, image, _) in enumerate(nature()) if number % 10 == 0]
    canvas = np.full((len(pictures), 32, 32, 3), 255, dtype=np.uint8)
    for square, picture in zip(canvas, pictures, strict=True):
        square[: picture.height, : picture.width] = np.asarray(picture)
    return canvas


def test_the_classifier_names_two_photographs():
    """ImageNet's palace and daisy: wrong weights, padding or normalisation lose the second."""
    from sklearn import datasets

    photographs = [datasets.load_sample_image(name)[:420, 110:530] for name in ("china.jpg", "flower.jpg")]
    assert efficientnet()(preprocess(np.stack(photographs))).argmax(1).tolist() == [698, 985]


@pytest.mark.parametrize("features", [image_features, cell_colors])
def test_noisy_pictures_find_themselves_and_shuffled_ones_do_not(emoji_pictures, features):
    real, rng = emoji_pictures, np.random.default_rng(0)
    noisy = np.clip(real + rng.normal(0, 12, real.shape), 0, 255).astype(np.uint8)
    ids = np.arange(len(real))
    own = rank_report(features(noisy), features(real), ids)
    assert (own["n"], own["candidates"]) == (len(real), len(real))
    assert own["top1"] > 0.9
    assert own["mean_rank"] < 1.5
    other = rank_report(features(noisy), features(real), (ids + 7) % len(real))
    assert other["top1"] < 0.1
    assert other["mean_rank"] == pytest.approx((len(real) + 1) / 2, rel=0.3)


def test_white_padding_keeps_the_aspect_ratio():
    wide = np.zeros((1, 16, 32, 3), dtype=np.uint8)
    x = preprocess(wide)
    assert x.shape == (1, 3, 224, 224)
    assert torch.all(x[:, :, :50] > 0.99)
    assert torch.all(x[:, :, 62:162] < -0.99)


def test_ranks_of_a_hand_made_case():
    real = np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    report = rank_report(np.array([[0.9, 0.1], [0.9, 0.1], [0.0, 2.0]]), real, np.array([0, 1, 2]))
    assert report == {"top1": pytest.approx(2 / 3), "top5": 1.0, "mean_rank": pytest.approx(2.0), "n": 3, "candidates": 4}


def test_equal_pictures_share_their_ranks():
    real = np.array([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
    report = rank_report(np.array([[2.0, 0.0]]), real, np.array([1]))
    assert (report["top1"], report["mean_rank"]) == (0.0, 1.5)


def test_impossible_questions_are_refused():
    two = np.eye(2)
    with pytest.raises(ValueError, match="places below 2"):
        rank_report(two, two, np.array([0, 2]))
    with pytest.raises(ValueError, match="at least two candidates"):
        rank_report(two, two[:1], np.array([0, 0]))
