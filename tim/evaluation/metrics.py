"""Scores of features apart from the Fréchet distance: inception score, kernel distance, precision and recall."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

ROWS = 2048  # rows of a block of distances


def inception_score(probs: np.ndarray, split_size: int = 5000) -> tuple[float, float]:
    """exp E KL(p(y|x) || p(y)) of class probabilities (N, K), over consecutive splits as ADM takes them.

    Returns:
        mean and standard deviation over the splits.
    """
    scores = []
    for start in range(0, len(probs), split_size):
        p = probs[start : start + split_size].astype(np.float64)
        marginal = p.mean(axis=0, keepdims=True)
        terms = np.where(p > 0, p * (np.log(np.maximum(p, np.finfo(np.float64).tiny)) - np.log(marginal + (marginal == 0))), 0)
        scores.append(np.exp(terms.sum(axis=1).mean()))
    return float(np.mean(scores)), float(np.std(scores))


def kernel_distance(samples: np.ndarray, real: np.ndarray, subset_size: int = 1000) -> tuple[float, float]:
    """Kernel (Inception) distance with the cubic kernel over 100 random subsets, by torch-fidelity.

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


def precision_recall(samples: np.ndarray, real: np.ndarray, k: int = 3, device: torch.device | None = None) -> PrecisionRecall:
    """Improved precision and recall (Kynkäänniemi et al. 2019): balls that reach to the k-th nearest neighbour.

    Args:
        samples, real: features (N, D), (M, D).
        device: where distances are computed.

    Raises:
        ValueError: when a set has k images or fewer.
    """
    if min(len(samples), len(real)) <= k:
        raise ValueError(f"precision and recall with k={k} need more images, got {len(samples)} and {len(real)}")
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
