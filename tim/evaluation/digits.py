"""Quality of generated digits: Fréchet distance and accuracy under a small classifier of the real ones."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from tim.data.c2i import PackageDataset
from tim.evaluation.metrics import frechet_distance, statistics

FEATURES = 64


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
            nn.Linear(64 * 16, FEATURES),
            nn.ReLU(),
        )
        self.out = nn.Linear(FEATURES, 10)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 1, 8, 8) in [-1, 1] to features (B, 64) and logits (B, 10)."""
        features = self.hidden(x)
        return features, self.out(features)


@dataclass
class DigitJudge:
    """The trained classifier, the statistics of the real digits, and its accuracy on digits it has not seen."""

    classifier: DigitClassifier
    mean: np.ndarray
    cov: np.ndarray
    held_out_accuracy: float

    @torch.no_grad()
    def measure(self, images: Tensor, labels: Tensor) -> dict[str, float]:
        """Fréchet distance to all real digits and the share of images classified as their label."""
        features, logits = self.classifier(images.float().clamp(-1, 1))
        distance = frechet_distance(*statistics(features.numpy()), self.mean, self.cov)
        return {"frechet_distance": distance, "accuracy": (logits.argmax(1) == labels).float().mean().item()}


def train_judge(seed: int = 0, epochs: int = 30) -> DigitJudge:
    """Train the classifier on a fixed four fifths of scikit-learn's digits (seconds on a CPU); deterministic in `seed`."""
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
    net.eval().requires_grad_(False)
    features, logits = net(images)
    accuracy = (logits[held_out].argmax(1) == labels[held_out]).float().mean().item()
    return DigitJudge(net, *statistics(features.numpy()), accuracy)
