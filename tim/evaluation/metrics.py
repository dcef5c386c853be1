"""Distances and scores of features: Fréchet and kernel distance, inception score, precision and recall."""

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

ROWS = 2048  # rows of a block of distances
NEIGHBOURS = 3  # k of precision and recall
SKEW = 1e-5  # of the largest value: more than float32 rounds by


@dataclass
class Statistics:
    """Mean (D,), covariance (D, D) and number of features; the number is None where a file does not tell it.

    `source` names file and arrays that they were read from.
    """

    mean: np.ndarray
    cov: np.ndarray
    count: int | None = None
    source: str | None = None

    @classmethod
    def checked(
        cls, mean: np.ndarray, cov: np.ndarray, path: str | Path, names: tuple[str, str] = ("mu", "sigma")
    ) -> "Statistics":
        """Statistics read from a file.

        Args:
            names: of the two arrays in the file.

        Raises:
            ValueError: names file and array of what is no mean (D,) and covariance (D, D): other shapes or types, values that
                are not finite, a matrix that is not symmetric or not positive semi-definite.
        """
        if mean.ndim != 1 or not len(mean) or cov.shape != (len(mean), len(mean)):
            raise ValueError(f"{path}: {' and '.join(names)} are no mean and covariance: {mean.shape} and {cov.shape}")
        for name, values in zip(names, (mean, cov), strict=True):
            if values.dtype.kind != "f" or values.dtype.itemsize < 4:
                raise ValueError(f"{path}: {name} is {values.dtype}; a distance needs float32 or float64")
            if not np.isfinite(values).all():
                raise ValueError(f"{path}: {name} is not finite (NaN or infinity); compute it again")
        mean, cov = mean.astype(np.float64), cov.astype(np.float64)
        if np.abs(cov - cov.T).max() > SKEW * np.abs(cov).max():
            raise ValueError(f"{path}: {names[1]} is no covariance: it is not symmetric; compute it again")
        try:  # Cholesky's factor tells in a tenth of the time that eigenvalues take
            np.linalg.cholesky((cov + cov.T) / 2 + SKEW * (np.abs(cov).max() or 1.0) * np.eye(len(cov)))
        except np.linalg.LinAlgError:
            variances = np.linalg.eigvalsh((cov + cov.T) / 2)
            raise ValueError(
                f"{path}: {names[1]} is no covariance: it has the negative eigenvalue {variances[0]:.3g} "
                f"(the largest is {variances[-1]:.3g}); compute it again, in float64"
            ) from None
        return cls(mean, cov, source=f"{path} ({' and '.join(names)})")


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
    count, total = 0, np.zeros(())
    for part in parts():
        count, total = count + len(part), total + part.sum(axis=0, dtype=np.float64)
    if count < 2:
        raise ValueError(f"statistics need at least two feature rows, got {count}")
    mean = total / count
    scatter = sum((centred := part.astype(np.float64) - mean).T @ centred for part in parts())
    return Statistics(mean, np.atleast_2d(scatter / (count - 1)), count)


def frechet_distance(mean_a: np.ndarray, cov_a: np.ndarray, mean_b: np.ndarray, cov_b: np.ndarray) -> float:
    """|mean_a - mean_b|² + tr(A + B - 2 (A^1/2 B A^1/2)^1/2) of two Gaussians (FID: Heusel et al. 2017).

    With A = R R^T and B = S S^T, the trace of the root is the sum of the singular values of R^T S: real,
    non-negative, and as exact as rounding allows also where covariances are singular or ill-conditioned, because no
    product of covariances is rooted.

    Raises:
        ValueError: for statistics of other widths, or that are not finite.
    """
    if mean_a.shape != mean_b.shape or cov_a.shape != cov_b.shape:
        raise ValueError(f"statistics differ in width: {len(mean_a)} features against {len(mean_b)}; use the same network")
    if not all(np.isfinite(u).all() for u in (mean_a, cov_a, mean_b, cov_b)):
        raise ValueError("statistics are not finite (NaN or infinity)")
    trace_root = np.linalg.svd(_factor(cov_a).T @ _factor(cov_b), compute_uv=False).sum()
    squared = ((mean_a - mean_b) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * trace_root
    return max(0.0, float(squared))  # rounding can leave a little less than nothing


def distance(a: Statistics, b: Statistics, what: str) -> float:
    """Fréchet distance; warns when a covariance cannot have full rank.

    Args:
        what: name of the features in the warning.

    Raises:
        ValueError: see `frechet_distance`; names the files that the statistics are of.
    """
    for found in (a, b):
        if found.count is not None and found.count <= len(found.mean):
            warnings.warn(
                f"{what}: {found.count} images for {len(found.mean)} features give a covariance of rank "
                f"{found.count - 1} at most; the distance is biased, use more images",
                stacklevel=2,
            )
    try:
        return frechet_distance(a.mean, a.cov, b.mean, b.cov)
    except ValueError as error:
        files = [found.source for found in (a, b) if found.source is not None]
        raise ValueError(": ".join([*files, str(error)])) from error


def _factor(cov: np.ndarray) -> np.ndarray:
    """R (D, rank) with cov = R R^T: Cholesky's with pivots, which ends where only rounding is left."""
    try:
        from scipy.linalg.lapack import dpstrf
    except ImportError as error:
        raise ValueError("the Fréchet distance needs scipy: pip install -e .[eval]") from error
    # covariances are symmetric but for rounding, and LAPACK reads one half alone; its pivots count from 1
    lower, pivots, rank, _ = dpstrf((cov + cov.T) / 2, lower=1)
    factor = np.empty((len(cov), rank))
    factor[pivots - 1] = np.tril(lower)[:, :rank]
    return factor


def inception_score(probs: np.ndarray, split_size: int = 5000) -> tuple[float, float]:
    """exp E KL(p(y|x) || p(y)) (Salimans et al. 2016) of class probabilities (N, K), over consecutive splits as ADM takes them.

    Warns of a last split that is short, which counts like the others.

    Returns:
        mean and standard deviation over the splits.
    """
    if last := len(probs) % split_size:
        splits = -(-len(probs) // split_size)
        warnings.warn(
            f"inception score: the last of {splits} splits has {last} images instead of {split_size}; "
            f"scores of short splits are biased, use a multiple of {split_size} images",
            stacklevel=2,
        )
    scores = []
    for start in range(0, len(probs), split_size):
        p = probs[start : start + split_size].astype(np.float64)
        marginal = p.mean(axis=0, keepdims=True)
        # p log p is 0 where p is 0: the logarithm there must be finite, whatever it is
        terms = np.where(p > 0, p * (np.log(np.maximum(p, np.finfo(np.float64).tiny)) - np.log(marginal + (marginal == 0))), 0)
        scores.append(np.exp(terms.sum(axis=1).mean()))
    return float(np.mean(scores)), float(np.std(scores))


def kernel_distance(samples: np.ndarray, real: np.ndarray, subset_size: int = 1000) -> tuple[float, float]:
    """Kernel distance (KID: Bińkowski et al. 2018), cubic kernel over 100 random subsets, by torch-fidelity.

    Args:
        samples, real: features (N, D), (M, D); subsets are never larger than either set.

    Returns:
        mean and standard deviation over the subsets.

    Raises:
        ValueError: when torch-fidelity is not installed, or a set has fewer than two rows.
    """
    try:
        from torch_fidelity import metric_kid
    except ImportError as error:
        raise ValueError("the kernel distance needs torch-fidelity: pip install -e .[eval]") from error
    size = min(subset_size, len(samples), len(real))
    if size < 2:
        raise ValueError(f"the kernel distance needs at least two images in each set, got {len(samples)} and {len(real)}")
    found = metric_kid.kid_features_to_metric(
        torch.from_numpy(samples).double(), torch.from_numpy(real).double(), kid_subset_size=size, verbose=False
    )
    return found[metric_kid.KEY_METRIC_KID_MEAN], found[metric_kid.KEY_METRIC_KID_STD]


@dataclass
class PrecisionRecall:
    """Share of samples inside the real manifold, and of real images inside that of the samples."""

    precision: float
    recall: float


def precision_recall(
    samples: np.ndarray, real: np.ndarray, k: int = NEIGHBOURS, device: torch.device | None = None
) -> PrecisionRecall:
    """Improved precision and recall (Kynkäänniemi et al. 2019): balls that reach to the k-th nearest neighbour.

    Args:
        samples, real: features (N, D), (M, D).
        device: where distances are computed.

    Raises:
        ValueError: when a set has k images or fewer, or features that are not finite, which lie in no ball.
    """
    if min(len(samples), len(real)) <= k:
        raise ValueError(f"precision and recall with k={k} need more images, got {len(samples)} and {len(real)}")
    for name, features in (("samples", samples), ("real images", real)):
        broken = np.flatnonzero(~np.isfinite(features).all(axis=1))
        if len(broken):
            raise ValueError(
                f"{len(broken)} of {len(features)} {name} have features that are not finite, first number {broken[0]}"
            )
    # balls around the real images hold the samples that could be real, and the other way round
    a, b = (torch.from_numpy(u).to(device).contiguous() for u in (samples, real))
    return PrecisionRecall(_share_inside(a, b, _radii(b, k)), _share_inside(b, a, _radii(a, k)))


def _radii(points: Tensor, k: int) -> Tensor:
    """Distance of each point to its k-th nearest neighbour; the point itself is the zeroth."""
    return torch.cat([_distances(rows, points).kthvalue(k + 1).values for rows in points.split(ROWS)])


def _share_inside(points: Tensor, centres: Tensor, radii: Tensor) -> float:
    """Share of points in at least one ball."""
    inside = [(_distances(rows, centres) <= radii).any(dim=1) for rows in points.split(ROWS)]
    return torch.cat(inside).double().mean().item()


def _distances(a: Tensor, b: Tensor) -> Tensor:
    """Distances (n, m) by a matrix product, which a block of 2,048 x 50,000 needs to be fast."""
    return torch.cdist(a, b, compute_mode="use_mm_for_euclid_dist")
