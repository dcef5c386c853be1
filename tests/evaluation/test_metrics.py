"""Inception score, kernel distance, precision and recall against torch-fidelity and by hand."""

import warnings

import numpy as np
import pytest
import torch
from torch_fidelity import metric_isc, metric_kid, metric_prc

from tim.evaluation.adm import reference_rows
from tim.evaluation.metrics import inception_score, kernel_distance, precision_recall


@pytest.fixture
def features():
    g = np.random.default_rng(0)
    return g.normal(size=(400, 24)).astype(np.float32), (g.normal(size=(300, 24)) * 1.2 + 0.3).astype(np.float32)


def test_inception_score_equals_torch_fidelity():
    logits = torch.randn(600, 50, generator=torch.Generator().manual_seed(0)) * 3
    theirs = metric_isc.isc_features_to_metric(logits, splits=3, shuffle=False)
    mean, std = inception_score(logits.double().softmax(1).numpy(), split_size=200)
    assert mean == pytest.approx(theirs["inception_score_mean"], rel=1e-6)
    assert std == pytest.approx(theirs["inception_score_std"], rel=1e-6)


@pytest.mark.filterwarnings("ignore:inception score")
def test_inception_score_of_sure_and_unsure_classifiers():
    assert inception_score(np.eye(10)[np.arange(50) % 10])[0] == pytest.approx(10)
    assert inception_score(np.full((50, 10), 0.1))[0] == pytest.approx(1)
    assert inception_score(np.eye(10)[np.arange(50) % 10], split_size=40) == pytest.approx((10, 0))


def test_a_short_last_split_is_said():
    probs = np.eye(10)[np.arange(50) % 10]
    with pytest.warns(UserWarning, match="the last of 2 splits has 10 images instead of 40; .* use a multiple of 40 images"):
        inception_score(probs, split_size=40)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inception_score(probs, split_size=25)


def test_precision_and_recall_refuse_features_that_are_not_finite(features):
    samples, real = features
    samples[7, 3] = np.nan
    with pytest.raises(ValueError, match="1 of 400 samples have features that are not finite, first number 7"):
        precision_recall(samples, real)
    with pytest.raises(ValueError, match="1 of 400 real images have features that are not finite"):
        precision_recall(real, samples)


def test_kernel_distance_equals_torch_fidelity_and_its_definition(features):
    theirs = metric_kid.kid_features_to_metric(
        *(torch.from_numpy(u).double() for u in features), kid_subset_size=100, verbose=False
    )
    mean, std = kernel_distance(*features, subset_size=100)
    assert mean == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-6)
    assert std == pytest.approx(theirs["kernel_inception_distance_std"], rel=1e-6)
    x, y = (u.astype(np.float64)[:300] for u in features)
    kernel = [(a @ b.T / 24 + 1) ** 3 for a, b in ((x, x), (y, y), (x, y))]
    own = sum(k.sum() - np.trace(k) for k in kernel[:2]) / (300 * 299)
    assert kernel_distance(x, y)[0] == pytest.approx(own - 2 * kernel[2].mean(), rel=1e-9)
    with pytest.raises(ValueError, match="at least two"):
        kernel_distance(x[:1], y)


def test_precision_and_recall_equal_torch_fidelity(features):
    samples, real = features
    theirs = metric_prc.prc_features_to_metric(*map(torch.from_numpy, features), verbose=False)
    found = precision_recall(samples, real)
    assert (found.precision, found.recall) == pytest.approx((theirs["precision"], theirs["recall"]), rel=1e-6)
    assert 0 < found.precision != found.recall < 1


def test_precision_and_recall_know_which_side_is_which():
    """Samples in one of two clusters of the real images: all of them plausible, half of the real ones covered."""
    g = np.random.default_rng(0)
    real = np.concatenate([g.normal(size=(50, 4)), g.normal(size=(50, 4)) + 100])
    found = precision_recall(real[:50] + 1e-3, real)
    assert found.precision == 1 and found.recall == 0.5
    with pytest.raises(ValueError, match="k=3 need more images"):
        precision_recall(real[:3], real)


def test_reference_rows_are_all_or_ten_thousand_spread_over_the_classes():
    assert reference_rows(50).tolist() == list(range(50))
    rows = reference_rows(50_000)
    assert len(set(rows)) == 10_000 and (np.bincount(rows // 1000) == 200).all()
