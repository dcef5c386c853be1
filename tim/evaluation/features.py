"""Feature networks for comparing two folders: what each sees, and how images reach it."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tim.evaluation.inputs import Transform

FEATURES = ("digits", "efficientnet", "inception")


@dataclass
class FeatureNetwork:
    """A network that turns transformed images into {'features': (B, D)}.

    Attributes:
        name: printed beside every number.
        identity: what the features depend on, for cache and record.
        transform: uint8 (H, W, 3) to the network's input.
    """

    name: str
    identity: dict[str, Any]
    transform: Transform
    network: Callable[[Tensor], dict[str, Tensor]]


def feature_network(name: str, device: torch.device, inception: Path | None = None) -> FeatureNetwork:
    """One of `FEATURES` on a device.

    Args:
        inception: weights file for `inception`; the usual places when None.

    Raises:
        ValueError: for an unknown name, or a missing package.
        FileNotFoundError: when there are no Inception weights.
    """
    if name not in FEATURES:
        raise ValueError(f"features {name!r} are not one of {', '.join(FEATURES)}")
    if name == "inception":
        return _inception(device, inception)
    return _digits(device) if name == "digits" else _efficientnet(device)


def _digits(device: torch.device) -> FeatureNetwork:
    from tim.evaluation.digits import train_judge

    classifier = train_judge().classifier.to(device)
    return FeatureNetwork(
        "hidden layer (64) of a classifier of scikit-learn's digits",
        {"network": "digits", "weights_sha256": _weights_digest(classifier)},
        _grey_digit,
        lambda x: {"features": classifier(x)[0]},
    )


def _grey_digit(pixels: np.ndarray) -> Tensor:
    """uint8 (8, 8, 3) to (1, 8, 8) in [-1, 1]."""
    if pixels.shape[:2] != (8, 8):
        raise ValueError(f"digits features need 8x8 images, got {pixels.shape[1]}x{pixels.shape[0]}")
    return torch.from_numpy(pixels.mean(axis=2, dtype=np.float32))[None] / 127.5 - 1


def _efficientnet(device: torch.device) -> FeatureNetwork:
    from tim.evaluation.retrieval import classifier, penultimate, preprocess

    network = classifier().to(device)
    return FeatureNetwork(
        "penultimate layer (1280) of EfficientNet-lite0, ImageNet, padded to a square of 224",
        {"network": "efficientnet-lite0", "weights_sha256": _weights_digest(network)},
        lambda pixels: preprocess(pixels[None])[0],
        lambda x: {"features": penultimate(network, x)},
    )


def _inception(device: torch.device, path: Path | None) -> FeatureNetwork:
    from tim.evaluation.inception import load_inception, tensorflow_resize

    network = load_inception(path, device)
    return FeatureNetwork(
        "pool3 (2048) of Inception-2015-12-05",
        {"network": "inception-2015-12-05", "weights_sha256": network.weights_sha256, "resize": "tensorflow bilinear 299"},
        tensorflow_resize,
        lambda x: {"features": network.features_299(x)["pool3"]},
    )


def _weights_digest(network: nn.Module) -> str:
    """sha256 of all tensors of a network, for one that has no file of its own."""
    digest = hashlib.sha256()
    for name, value in network.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
