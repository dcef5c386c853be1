"""Detected objects, and how the instances of a mask-classification network become them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as nnf
from omegaconf import OmegaConf
from PIL import Image
from torch import Tensor

_COCO: Any = OmegaConf.to_container(OmegaConf.load(Path(__file__).with_name("coco.yaml")))
COCO_CLASSES: tuple[str, ...] = tuple(_COCO["classes"])
SYNONYMS: dict[str, str] = _COCO["synonyms"]  # to names of COCO_CLASSES
MAX_DETECTIONS = 100  # per image, as in COCO's evaluation
MASKS_AT_ONCE = 8  # resized together: 100 masks of a large image would fill gigabytes


@dataclass(frozen=True)
class Detections:
    """Objects found in one image of height H and width W, best score first.

    Attributes:
        labels: (N,) int, index into COCO_CLASSES.
        boxes: (N, 4) float32, x1, y1, x2, y2 in pixels.
        scores: (N,) float32 in [0, 1].
        masks: (N, H, W) bool; None from detectors that give boxes alone.
    """

    labels: np.ndarray
    boxes: np.ndarray
    scores: np.ndarray
    masks: np.ndarray | None


class Detector(Protocol):
    """Finds COCO's objects in an RGB image.

    Attributes:
        name: what results are filed under.
        identity: name and the sha256 of local weights, for result files.
    """

    name: str
    identity: dict[str, Any]

    def __call__(self, image: Image.Image) -> Detections: ...


@torch.no_grad()
def find_instances(
    class_logits: Tensor,
    mask_logits: Tensor,
    padded: tuple[int, int],
    unpadded: tuple[int, int],
    size: tuple[int, int],
    labels: Sequence[int | None],
) -> Detections:
    """Turn a mask-classification network's output for one image into scored instances.

    The best 100 pairs of query and class by class probability are kept; an instance's score is that probability times
    the mean probability inside its mask.

    Args:
        class_logits: (Q, K + 1), the last column is "no object".
        mask_logits: (Q, h, w) on a grid over the padded network input.
        padded: height and width of the network input.
        unpadded: height and width of its upper left part that shows the image.
        size: height and width of the image.
        labels: index into COCO_CLASSES of each of the K classes, None for classes of no interest.

    Returns:
        at most 100 instances; an instance with an empty mask has a zero box and score 0.
    """
    known = [k for k, label in enumerate(labels) if label is not None]
    probabilities = class_logits.float().softmax(-1)[:, known]
    scores, flat = probabilities.flatten().topk(min(MAX_DETECTIONS, probabilities.numel()))
    # a query may be among the best with several classes: its mask is resized once
    queries, masks_index = (flat // len(known)).unique(return_inverse=True)
    parts = [_read_masks(mask_logits[chunk], padded, unpadded, size) for chunk in queries.split(MASKS_AT_ONCE)]
    masks, quality, boxes = (torch.cat(part) for part in zip(*parts, strict=True))
    scores = scores * quality[masks_index]
    order = scores.argsort(descending=True, stable=True)
    columns = (flat % len(known))[order].tolist()
    masks_index = masks_index[order]
    return Detections(
        labels=np.array([labels[known[column]] for column in columns], dtype=np.int64),
        boxes=boxes[masks_index].cpu().numpy(),
        scores=scores[order].cpu().numpy(),
        masks=masks[masks_index.to(masks.device)].numpy(),
    )


def _read_masks(
    logits: Tensor, padded: tuple[int, int], unpadded: tuple[int, int], size: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Mask logits (n, h, w) to masks (n, H, W) bool on the CPU, quality (n,) and boxes (n, 4) on the logits' device."""
    logits = nnf.interpolate(logits[None].float(), padded, mode="bilinear", align_corners=False)
    logits = logits[..., : unpadded[0], : unpadded[1]]
    logits = nnf.interpolate(logits, size, mode="bilinear", align_corners=False)[0]
    masks = logits > 0
    inside = (logits.sigmoid() * masks).flatten(1).sum(1)
    # the small term keeps an empty mask at quality 0
    quality = inside / (masks.flatten(1).sum(1) + 1e-6)
    return masks.cpu(), quality, mask_boxes(masks)


def mask_boxes(masks: Tensor) -> Tensor:
    """Tight boxes (n, 4) float32 around masks (n, H, W) bool: x1, y1, x2, y2 with the far edges outside; 0 if empty."""
    edges = [_extent(masks.any(dim)) for dim in (1, 2)]  # columns, then rows
    (x1, x2), (y1, y2) = edges
    return torch.stack([x1, y1, x2, y2], dim=1).float()


def _extent(hits: Tensor) -> tuple[Tensor, Tensor]:
    """First index and last index + 1 of the hits (n, L) in each row; 0 and 0 without hits."""
    numbers = torch.arange(1, hits.shape[1] + 1, device=hits.device) * hits
    return hits.int().argmax(1), numbers.amax(1)
