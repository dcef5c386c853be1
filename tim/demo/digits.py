"""Quality of generated digits: Fréchet distance and accuracy under a small classifier of the real ones."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tim.data.c2i import PackageDataset
from tim.evaluation.features import grey_digit, train_digit_classifier
from tim.evaluation.metrics import frechet_distance, statistics


class DigitJudge:
    """Measures digits by a classifier of the real ones, trained on the spot: Fréchet distance and accuracy.

    Attributes:
        held_out_accuracy: of the classifier on digits that it has not seen.
    """

    def __init__(self) -> None:
        data = PackageDataset("digits")
        self.images, self.labels = data.images, torch.from_numpy(np.asarray(data.labels))
        self.classifier, held_out = train_digit_classifier()
        features, logits = self.classifier(self.images)
        self.mean, self.cov = statistics(features.numpy())
        self.held_out_accuracy = (logits[held_out].argmax(1) == self.labels[held_out]).float().mean().item()

    def __call__(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> dict[str, float]:
        """Metrics of uint8 images (8, 8, 3), whose prompts are their digits."""
        return self.measure(torch.stack([grey_digit(image) for image in images]), torch.tensor([int(p) for p in prompts]))

    @torch.no_grad()
    def measure(self, images: Tensor, labels: Tensor) -> dict[str, float]:
        """Fréchet distance of images (N, 1, 8, 8) in [-1, 1] to all real digits, and the share classified as their label."""
        features, logits = self.classifier(images.float().clamp(-1, 1))
        distance = frechet_distance(*statistics(features.numpy()), self.mean, self.cov)
        return {"frechet_distance": distance, "accuracy": (logits.argmax(1) == labels).float().mean().item()}

    def measure_real(self) -> dict[str, float]:
        """What the judge says of the data itself: its held-out accuracy, and the distance of 1,000 resampled real digits."""
        pick = np.random.default_rng(0).integers(len(self.images), size=1000)
        distance = self.measure(self.images[pick], self.labels[pick])["frechet_distance"]
        return {"held_out_accuracy": self.held_out_accuracy, "frechet_distance_of_1000_real": distance}
