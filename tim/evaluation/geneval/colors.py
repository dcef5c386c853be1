"""Colours of objects by CLIP: zero-shot classification of their pixels over GenEval's ten colours."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as nnf

from tim.evaluation.clip import Clip
from tim.evaluation.geneval.options import ORIGINAL
from tim.evaluation.geneval.rules import COLORS, Instance

TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")


class ColorClassifier:
    """Reads the colours of objects of an image.

    Args:
        clip: see `tim.evaluation.clip.load_clip`.
        crop: cut objects out by their boxes, else show the whole image.
        bgcolor: what replaces everything outside an object's mask (or box, without masks); 'original' keeps it.
    """

    def __init__(self, clip: Clip, crop: bool = True, bgcolor: str = "#999") -> None:
        self.clip, self.crop, self.bgcolor = clip, crop, bgcolor
        self._weights: dict[str, Tensor] = {}

    @torch.inference_mode()
    def __call__(self, image: Image.Image, name: str, instances: Sequence[Instance]) -> list[str]:
        """One of `COLORS` for each object of class `name`; image in RGB."""
        views = [self.clip.crop(cut_out(image, instance, self.crop, self.bgcolor)) for instance in instances]
        logits = 100 * self.clip.encode_images(torch.stack(views)) @ self.weights(name).T
        return [COLORS[k] for k in logits.argmax(dim=-1).tolist()]

    @torch.inference_mode()
    def weights(self, name: str) -> Tensor:
        """(10, D) a unit vector for each colour of a class: the mean of the templates' unit vectors, normalised again."""
        if name not in self._weights:
            texts = [template.format(color=color, name=name) for color in COLORS for template in TEMPLATES]
            features = self.clip.encode_texts(texts).unflatten(0, (len(COLORS), len(TEMPLATES)))
            self._weights[name] = nnf.normalize(features.mean(dim=1), dim=-1)
        return self._weights[name]


def cut_out(image: Image.Image, instance: Instance, crop: bool = True, bgcolor: str = "#999") -> Image.Image:
    """The object's box of an image (or all of it), everything outside its mask replaced by `bgcolor`."""
    x1, y1, x2, y2 = np.rint(instance.box).astype(int)
    x1, y1 = np.clip((x1, y1), 0, (image.width - 1, image.height - 1))
    x2, y2 = np.clip((x2, y2), (x1 + 1, y1 + 1), image.size)  # thin boxes keep a pixel
    region = (x1, y1, x2, y2) if crop else (0, 0, *image.size)
    view = image.crop(tuple(map(int, region)))
    if bgcolor == ORIGINAL:
        return view
    mask = instance.mask
    if mask is None:
        mask = np.zeros((image.height, image.width), dtype=bool)
        mask[y1:y2, x1:x2] = True
    own = Image.fromarray(mask[region[1] : region[3], region[0] : region[2]].astype(np.uint8) * 255)
    return Image.composite(view, Image.new("RGB", view.size, bgcolor), own)
