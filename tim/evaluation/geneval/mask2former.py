"""Mask2Former on transformers' network: GenEval's detector from mmdet's weights, and the steps of its test pipeline."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as nnf
from PIL import Image
from torch import Tensor

from tim.evaluation.geneval.convert_mmdet import INDEX, Config, convert_mmdet, relative_position_index
from tim.evaluation.geneval.detection import COCO_CLASSES, Detections, find_instances

NAME = "mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco"
SHORT_SIDE, LONG_SIDE = 800, 1333  # pixels the network sees: as many as fit
DIVISOR, PADDING = 32, 128  # sides are filled up to multiples of this, with this grey
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # of RGB in [0, 255]
# transformers' Swin and loss have these of their own, and prediction from images does not read weights in them
UNUSED = ("swin.layernorm.weight", "swin.layernorm.bias", "criterion.empty_weight", INDEX)

Prepared = tuple[Tensor, tuple[int, int]]  # network input (1, 3, H, W); height and width of the part that is no padding


def swin_s_config() -> Config:
    """The network of mmdet's config `mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco`."""
    from transformers import Mask2FormerConfig, SwinConfig

    stages = [f"stage{i}" for i in range(1, 5)]
    swin: dict[str, Any] = {"depths": [2, 2, 18, 2], "num_heads": [3, 6, 12, 24], "window_size": 7, "out_features": stages}
    head: dict[str, Any] = {"num_queries": 100, "num_labels": len(COCO_CLASSES)}
    return Mask2FormerConfig(backbone_config=SwinConfig(embed_dim=96, **swin), **head)


def build_mask2former(state: dict[str, Tensor], config: Config, source: object) -> Any:
    """Build the network with mmdet's weights, in evaluation mode on the CPU.

    Args:
        state: mmdet's state dict.
        source: the checkpoint's name, for errors.

    Raises:
        ValueError: names the keys that are missing, unknown, or of another shape or content than the network's.
    """
    from transformers import Mask2FormerForUniversalSegmentation
    from transformers.utils import logging

    converted = convert_mmdet(state, config, source)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # no report on tensors that are missing on purpose
    try:  # through from_pretrained, because names inside the network change with transformers' version
        loaded: Any = Mask2FormerForUniversalSegmentation.from_pretrained(
            None, config=config, state_dict=converted, output_loading_info=True
        )
    finally:
        logging.set_verbosity(verbosity)
    model, report = loaded
    unset = [k for k in report["missing_keys"] if not k.endswith(UNUSED)]
    if unset or report["unexpected_keys"]:
        raise ValueError(
            f"this version of transformers names the parts of Mask2Former otherwise: {unset or report['unexpected_keys']}; "
            "pip install 'transformers==5.17.0'"
        )
    index = relative_position_index(config.backbone_config.window_size).flatten()
    assert all(torch.equal(b.flatten(), index) for name, b in model.named_buffers() if name.endswith(INDEX))
    return model.float().eval().requires_grad_(False)


def prepare_image(image: Image.Image) -> Prepared:
    """Resize, pad and normalise an RGB image as mmdet's test pipeline does, in this order."""
    short, long = sorted(image.size)
    scale = min(LONG_SIDE / long, SHORT_SIDE / short)
    height, width = (int(side * scale + 0.5) for side in (image.height, image.width))
    pixels = torch.from_numpy(resize_bilinear(np.asarray(image), height, width)).permute(2, 0, 1)[None].float()
    pixels = nnf.pad(pixels, (0, -width % DIVISOR, 0, -height % DIVISOR), value=PADDING)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return (pixels - mean) / std, (height, width)


def resize_bilinear(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize (h, w, C) uint8 to (height, width, C) as OpenCV does: in fixed point, without antialiasing.

    OpenCV cuts off where others round, which darkens an image by a few hundredths of a grey level on average: more than
    the difference that the rest of the network's arithmetic may make.
    """
    top, bottom, low, high = _neighbours(pixels.shape[0], height)
    left, right, near, far = _neighbours(pixels.shape[1], width)
    pixels = pixels.astype(np.int32)
    # weights carry 11 bits: 22 after both axes, of which 4, 16 and 2 are cut off on the way, the last with rounding
    rows = (pixels[:, left] * near[:, None] + pixels[:, right] * far[:, None]) >> 4
    low, high = low[:, None, None], high[:, None, None]
    return ((((rows[top] * low) >> 16) + ((rows[bottom] * high) >> 16) + 2) >> 2).astype(np.uint8)


def _neighbours(old: int, new: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """For each of `new` pixels along a side: the two of the `old` ones that it lies between, their weights in 1/2048."""
    centre = ((np.arange(new) + 0.5) / (new / old) - 0.5).astype(np.float32)
    first = np.floor(centre).astype(np.int32)
    fraction = centre - first.astype(np.float32)
    near, far = (np.rint(w * 2048).astype(np.int32) for w in (1 - fraction, fraction))
    return first.clip(0, old - 1), (first + 1).clip(0, old - 1), near, far


class Mask2FormerDetector:
    """A Mask2Former for instances as a detector.

    Args:
        model: the network.
        prepare: RGB image to network input.
        labels: index into COCO_CLASSES of each of the network's classes, None for others.
        identity: see `Detector`.
        device: where to run it.
    """

    def __init__(
        self,
        model: Any,
        prepare: Callable[[Image.Image], Prepared],
        labels: Sequence[int | None],
        identity: dict[str, Any],
        device: torch.device,
    ) -> None:
        self.model, self.prepare, self.labels, self.device = model.to(device), prepare, labels, device
        self.name, self.identity = identity["name"], identity

    @torch.no_grad()
    def __call__(self, image: Image.Image) -> Detections:
        pixels, unpadded = self.prepare(image.convert("RGB"))
        out = self.model(pixel_values=pixels.to(self.device))
        return find_instances(
            out.class_queries_logits[0], out.masks_queries_logits[0],
            (pixels.shape[-2], pixels.shape[-1]), unpadded, (image.height, image.width), self.labels,
        )  # fmt: skip
