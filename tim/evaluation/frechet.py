"""Fréchet distance between two sets of features."""

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np


@dataclass
class Statistics:
    """Mean (D,), covariance (D, D) and number of features; the number is None where a file does not tell it."""

    mean: np.ndarray
    cov: np.ndarray
    count: int | None = None

    @classmethod
    def checked(cls, mean: np.ndarray, cov: np.ndarray, source: str) -> "Statistics":
        """Statistics read from a file.

        Raises:
            ValueError: names the source of arrays that are no mean (D,) and covariance (D, D).
        """
        if mean.ndim != 1 or cov.shape != (len(mean), len(mean)):
            raise ValueError(f"{source} are no mean and covariance: {mean.shape} and {cov.shape}")
        return cls(mean.astype(np.float64), cov.astype(np.float64))


def statistics(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean (D,) and covariance (D, D) of features (N, D), in float64.

    Raises:
        ValueError: for fewer than two rows.
    """
    if features.ndim != 2:
        raise ValueError(f"features must be rows (N, D), got shape {features.shape}")
    found = streaming_statistics(lambda: [features])
    return found.mean, found.cov


def streaming_statistics(parts: Callable[[], Iterable[np.ndarray]]) -> Statistics:
    """Mean and covariance of features that come in parts (n, D), in float64.

    Two passes, so that nothing is lost to the difference of large sums.

    Args:
        parts: starts a pass over the parts.

    Raises:
        ValueError: for fewer than two rows.
    """
    count, total = 0, np.float64(0)
    for part in parts():
        count, total = count + len(part), total + part.sum(axis=0, dtype=np.float64)
    if count < 2:
        raise ValueError(f"statistics need at least two feature rows, got {count}")
    mean = total / count
    scatter = sum((centred := part.astype(np.float64) - mean).T @ centred for part in parts())
    return Statistics(mean, np.atleast_2d(scatter / (count - 1)), count)


def frechet_distance(mean_a: np.ndarray, cov_a: np.ndarray, mean_b: np.ndarray, cov_b: np.ndarray) -> float:
    """|mean_a - mean_b|² + tr(A + B - 2 (A^1/2 B A^1/2)^1/2).

    With A = R R^T and B = S S^T, the trace of the root is the sum of the singular values of R^T S: real,
    non-negative, and as exact as rounding allows also where covariances are singular or ill-conditioned, because no
    product of covariances is rooted.

    Raises:
        ValueError: for statistics of other widths, or that are not finite.
    """
    if mean_a.shape != mean_b.shape or cov_a.shape != cov_b.shape:
        raise ValueError(f"statistics differ in width: {len(mean_a)} features against {len(mean_b)}; use the same network")
    if not all(np.isfinite(u).all() for u in (mean_a, cov_a, mean_b, cov_b)):
        raise ValueError("statistics are not finite (NaN or infinite features)")
    trace_root = np.linalg.svd(_factor(cov_a).T @ _factor(cov_b), compute_uv=False).sum()
    squared = ((mean_a - mean_b) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * trace_root
    return max(0.0, float(squared))  # rounding can leave a little less than nothing


def distance(a: Statistics, b: Statistics, what: str) -> float:
    """Fréchet distance; warns when a covariance cannot have full rank.

    Args:
        what: name of the features in the warning.

    Raises:
        ValueError: see `frechet_distance`.
    """
    for found in (a, b):
        if found.count is not None and found.count <= len(found.mean):
            warnings.warn(
                f"{what}: {found.count} images for {len(found.mean)} features give a covariance of rank "
                f"{found.count - 1} at most; the distance is biased, use more images",
                stacklevel=2,
            )
    return frechet_distance(a.mean, a.cov, b.mean, b.cov)


def _factor(cov: np.ndarray) -> np.ndarray:
    """R (D, rank) with cov = R R^T: Cholesky's with pivots, which ends where only rounding is left."""
    try:
        from scipy.linalg.lapack import dpstrf
    except ImportError as error:
        raise ValueError("the Fréchet distance needs scipy: pip install -e .[eval]") from error
    lower, pivots, rank, _ = dpstrf((cov + cov.T) / 2, lower=1)
    factor = np.empty((len(cov), rank))
    factor[pivots - 1] = np.tril(lower)[:, :rank]
    return factor
