"""Fréchet distance against closed forms, scipy and torch-fidelity, also where covariances are ill-conditioned."""

import numpy as np
import pytest
import torch

from tim.evaluation.metrics import Statistics, distance, frechet_distance, statistics, streaming_statistics


def rotation(width: int, seed: int = 0) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(width, width)))[0]


def test_frechet_distance_of_diagonal_gaussians():
    """|m1 - m2|² + sum (s1 - s2)²."""
    a, b = np.array([1.0, 4.0, 0.25]), np.array([9.0, 1.0, 0.25])
    got = frechet_distance(np.zeros(3), np.diag(a), np.array([1.0, 2.0, 0.0]), np.diag(b))
    assert got == pytest.approx(5 + ((a**0.5 - b**0.5) ** 2).sum(), rel=1e-10)


@pytest.mark.parametrize("low", [-6, -12, -30])
def test_ill_conditioned_covariances_have_their_closed_form(low):
    """Covariances with the same eigenvectors: sum (s1 - s2)², here over up to 36 decades of variance."""
    width, q = 96, rotation(96)
    a, b = 10 ** np.linspace(low, 6, width), 10 ** np.linspace(6, low, width)
    got = frechet_distance(np.zeros(width), (q * a) @ q.T, np.zeros(width), (q * b) @ q.T)
    assert got == pytest.approx(((a**0.5 - b**0.5) ** 2).sum(), rel=1e-7)


def test_the_distance_of_a_singular_covariance_to_itself_is_nothing():
    few = statistics(np.random.default_rng(0).normal(size=(5, 64)))
    assert frechet_distance(*few, *few) == pytest.approx(0, abs=1e-10)


def test_agrees_with_scipy_and_torch_fidelity():
    from scipy.linalg import sqrtm
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    g = np.random.default_rng(0)
    x, y = g.normal(size=(900, 64)), g.normal(size=(700, 64)) @ g.normal(size=(64, 64)) + 0.1
    (ma, ca), (mb, cb) = statistics(x), statistics(y)
    got = frechet_distance(ma, ca, mb, cb)
    assert got == pytest.approx(((ma - mb) ** 2).sum() + np.trace(ca + cb - 2 * sqrtm(ca @ cb).real), rel=1e-6)
    theirs = fid_statistics_to_metric(*(fid_features_to_statistics(torch.from_numpy(u)) for u in (x, y)), False)
    assert got == pytest.approx(theirs["frechet_inception_distance"], rel=1e-6)


def test_streamed_statistics_are_those_of_the_whole_also_far_from_zero():
    x = np.random.default_rng(0).normal(size=(1000, 8)) + 1e5
    found = streaming_statistics(lambda: (x[k : k + 137] for k in range(0, 1000, 137)))
    assert found.count == 1000
    np.testing.assert_allclose(found.mean, x.mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.cov, np.cov(x, rowvar=False), rtol=1e-9, atol=1e-12)


def test_bad_statistics_are_refused_and_few_images_warn():
    with pytest.raises(ValueError, match="two"):
        statistics(np.zeros((1, 4)))
    with pytest.raises(ValueError, match=r"4 features against 5"):
        frechet_distance(np.zeros(4), np.eye(4), np.zeros(5), np.eye(5))
    with pytest.raises(ValueError, match="not finite"):
        frechet_distance(np.full(4, np.nan), np.eye(4), np.zeros(4), np.eye(4))
    with pytest.raises(ValueError, match=r"f\.npz.*\(3,\) and \(4, 4\)"):
        Statistics.checked(np.zeros(3), np.eye(4), "f.npz")
    few = streaming_statistics(lambda: [np.random.default_rng(0).normal(size=(5, 8))])
    with pytest.warns(UserWarning, match="FID: 5 images for 8 features give a covariance of rank 4"):
        distance(few, few, "FID")


MEAN, COV = np.zeros(4), np.diag([4.0, 3.0, 2.0, 1.0])
NAN, SKEW, NEGATIVE = COV + np.diag([0, 0, 0, np.nan]), COV + np.eye(4, k=1), COV - 1.5 * np.eye(4)


@pytest.mark.parametrize(
    ("mean", "cov", "message"),
    [
        (MEAN.astype(np.float16), COV, "mu is float16; a distance needs float32 or float64"),
        (MEAN, COV.astype(np.float16), "sigma is float16; a distance needs"),
        (MEAN, COV.astype(int), "sigma is int64; a distance needs"),
        (MEAN + np.inf, COV, r"mu is not finite \(NaN or infinity\)"),
        (MEAN, NAN, "sigma is not finite"),
        (MEAN, SKEW, "sigma is no covariance: it is not symmetric"),
        (MEAN, NEGATIVE, r"sigma is no covariance: it has the negative eigenvalue -0\.5 \(the largest is 2\.5\)"),
        (np.zeros(0), np.zeros((0, 0)), r"mu and sigma are no mean and covariance: \(0,\) and \(0, 0\)"),
        (MEAN[:, None], COV, r"mu and sigma are no mean and covariance: \(4, 1\) and \(4, 4\)"),
    ],
)
def test_statistics_that_cannot_be_are_refused_by_file_and_array(mean, cov, message):
    with pytest.raises(ValueError, match=r"^f\.npz: " + message):
        Statistics.checked(mean, cov, "f.npz")


def test_rounding_is_no_damage():
    """Covariances of fewer images than features, saved in float32, have eigenvalues a little below zero."""
    mean, cov = statistics(np.random.default_rng(0).normal(size=(40, 96)))
    rounded = Statistics.checked(mean.astype(np.float32), cov.astype(np.float32), "f.npz")
    assert np.linalg.eigvalsh(rounded.cov)[0] < 0
    assert distance(rounded, Statistics(mean, cov), "FID") == pytest.approx(0, abs=1e-4)
    Statistics.checked(np.zeros(3), np.zeros((3, 3)), "f.npz")
    with pytest.raises(ValueError, match=r"^f\.npz \(mu and sigma\): .* 96 features against 4"):
        distance(rounded, Statistics(MEAN, COV), "FID")
