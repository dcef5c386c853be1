"""The detector that a path or a hub id names: mmdet's checkpoint, or a detector of transformers under its own name.

Of transformers' detectors: any Mask2Former, DETR and its kin, and the open-vocabulary OWL and Grounding DINO.
"""

import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.ops import box_convert

from tim.digests import cached_sha256
from tim.evaluation.geneval.detection import COCO_CLASSES, MAX_DETECTIONS, SYNONYMS, Detections, Detector
from tim.evaluation.geneval.mask2former import (
    NAME,
    UNUSED,
    Mask2FormerDetector,
    Prepared,
    build_mask2former,
    prepare_image,
    swin_s_config,
)
from tim.evaluation.inputs import shown
from tim.evaluation.pretrained import load_pretrained
from tim.models.loading import read_state_dict

OWL, GROUNDING = ("owlvit", "owlv2"), ("grounding-dino", "mm-grounding-dino")  # model types
Found = tuple[Tensor, Tensor, Tensor]  # scores (n,), indices into COCO_CLASSES or -1 (n,), boxes (n, 4) in pixels


def load_detector(model_path: str, device: torch.device) -> Detector:
    """Load GenEval's detector from mmdet's checkpoint, or another detector, under its own name, in transformers' format.

    Args:
        model_path: mmdet's checkpoint of `mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco` (.pth) or the folder that it is
            in; else a folder or hub id of a Mask2Former, object detector, OWL or Grounding DINO of transformers.
        device: where to run it.

    Raises:
        FileNotFoundError: when there is neither a checkpoint nor a config.json.
        ValueError: when the model cannot be used; the message says why.
    """
    checkpoint = find_checkpoint(model_path)
    if checkpoint is None:
        return _load_transformers(model_path, device)
    model = build_mask2former(_read(checkpoint), swin_s_config(), checkpoint)
    identity = {"name": f"{NAME} (mmdet weights)", "weights_sha256": {checkpoint.name: cached_sha256(checkpoint)}}
    return Mask2FormerDetector(model, prepare_image, range(len(COCO_CLASSES)), identity, device)


def find_checkpoint(model_path: str) -> Path | None:
    """mmdet's checkpoint at a path; None when the path is a folder in transformers' format or a hub id.

    Raises:
        FileNotFoundError: when there is nothing of the kind.
        ValueError: when a folder holds several checkpoints.
    """
    path = Path(model_path)
    if path.is_file():
        return path
    if not path.is_dir():
        if path.suffix == ".pth" or path.is_absolute() or len(path.parts) > 2 or model_path.startswith("."):
            raise FileNotFoundError(f"--model-path: no file or folder {model_path}")
        return None
    if (plain := path / f"{NAME}.pth").is_file():
        return plain
    found = sorted(path.glob(f"{NAME}*.pth"))  # as published, with a date and a hash
    if len(found) > 1:
        raise ValueError(f"--model-path {path} holds {', '.join(p.name for p in found)}; name one of them")
    if not found and not (path / "config.json").is_file():
        raise FileNotFoundError(f"--model-path {path} holds no {NAME}.pth and no config.json")
    return found[0] if found else None


def _read(checkpoint: Path) -> dict[str, torch.Tensor]:
    try:
        return read_state_dict(checkpoint)
    except ValueError as error:
        if not isinstance(error.__cause__, pickle.UnpicklingError):
            raise
        raise ValueError(
            f"{error}; if you trust the file, keep its tensors alone: python -c 'import torch; torch.save(torch.load("
            f'"{checkpoint}", weights_only=False)["state_dict"], "{checkpoint.with_suffix("")}_tensors.pth")\''
        ) from error


def _load_transformers(model_path: str, device: torch.device) -> Detector:
    import transformers as hf

    def choose(config: Any) -> tuple[Any, ...]:
        if config.model_type == "mask2former":
            return _mask2former, hf.Mask2FormerForUniversalSegmentation, hf.AutoImageProcessor
        if config.model_type in OWL + GROUNDING:
            detector = OwlDetector if config.model_type in OWL else GroundingDetector
            return detector, hf.AutoModelForZeroShotObjectDetection, hf.AutoProcessor
        if type(config) in hf.MODEL_FOR_OBJECT_DETECTION_MAPPING:
            return BoxDetector, hf.AutoModelForObjectDetection, hf.AutoImageProcessor
        raise ValueError(f"a {config.model_type} is no Mask2Former, object detector, OWL or Grounding DINO")

    return load_pretrained(model_path, choose, f"--model-path {model_path} is no detector's folder or hub id", device, UNUSED)


def coco_labels(id2label: Mapping[int, str], count: int, name: str) -> list[int | None]:
    """Index into COCO_CLASSES of a model's classes 0 to count - 1; None for classes that are not among COCO's.

    Warns of classes that the model does not know, since it will never see one.

    Raises:
        ValueError: when it knows none.
    """
    index = {label: k for k, label in enumerate(COCO_CLASSES)}
    plain = [id2label.get(k, "").lower().replace("_", " ").replace("-", " ").strip() for k in range(count)]
    labels = [index.get(SYNONYMS.get(label, label)) for label in plain]
    unknown = [label for k, label in enumerate(COCO_CLASSES) if k not in labels]
    if len(unknown) == len(COCO_CLASSES):
        own = [id2label[k] for k in sorted(id2label)]
        raise ValueError(f"{name} knows none of COCO's classes; its own are {shown(own)}")
    if unknown:
        warnings.warn(f"{name} does not know {len(unknown)} of COCO's classes: {', '.join(unknown)}", stacklevel=2)
    return labels


def _mask2former(model: Any, identity: dict[str, Any], processor: Any) -> Mask2FormerDetector:
    def prepare(image: Image.Image) -> Prepared:
        inputs = processor(images=image, return_tensors="pt")
        shown = inputs["pixel_mask"][0].bool()
        return inputs["pixel_values"], (int(shown.any(1).sum()), int(shown.any(0).sum()))

    labels = coco_labels(model.config.id2label, model.config.num_labels, identity["name"])
    return Mask2FormerDetector(model.float(), prepare, labels, identity, model.device)


class BoxDetector:
    """DETR and its kin: boxes without masks, of the classes that the model was trained on.

    Args:
        model: the network.
        identity: see `Detector`.
        processor: its image processor, or processor of images and texts.
    """

    def __init__(self, model: Any, identity: dict[str, Any], processor: Any) -> None:
        self.model, self.processor, self.device = model.float(), processor, model.device
        self.name, self.identity = identity["name"], identity
        self._prepare_classes()

    def _prepare_classes(self) -> None:
        """What the processor is given beside images, how it reads the output, and COCO's index of each of its classes."""
        self.texts: dict[str, Any] = {}
        self.post_process = self.processor.post_process_object_detection
        labels = coco_labels(self.model.config.id2label, self.model.config.num_labels, self.name)
        self.labels = torch.tensor([-1 if label is None else label for label in labels], device=self.device)

    def _find(self, image: Image.Image) -> Found:
        inputs = self.processor(images=image, **self.texts, return_tensors="pt").to(self.device)
        size = [(image.height, image.width)]
        found = self.post_process(self.model(**inputs), threshold=0.0, target_sizes=size)[0]
        return found["scores"], self.labels[found["labels"]], found["boxes"]

    @torch.no_grad()
    def __call__(self, image: Image.Image) -> Detections:
        scores, labels, boxes = self._find(image.convert("RGB"))
        known = labels >= 0
        scores, labels, boxes = scores[known], labels[known], boxes[known]
        best = scores.argsort(descending=True, stable=True)[:MAX_DETECTIONS]
        limits = torch.tensor([image.width, image.height] * 2, device=boxes.device)
        boxes = boxes[best].clamp(min=0).minimum(limits)
        return Detections(
            labels=labels[best].cpu().numpy(),
            boxes=boxes.float().cpu().numpy(),
            scores=scores[best].float().cpu().numpy(),
            masks=None,
        )


class OwlDetector(BoxDetector):
    """OWL-ViT and OWLv2, asked for a photo of each of COCO's classes."""

    def _prepare_classes(self) -> None:
        self.texts = {"text": [[f"a photo of a {name}" for name in COCO_CLASSES]]}
        self.post_process = self.processor.post_process_grounded_object_detection
        self.labels = torch.arange(len(COCO_CLASSES), device=self.device)


class GroundingDetector(BoxDetector):
    """Grounding DINO, given the names of COCO's classes as one text; a class scores the mean over its tokens."""

    def _prepare_classes(self) -> None:
        self.text = "".join(f"{name}. " for name in COCO_CLASSES).strip()
        offsets = torch.tensor(self.processor.tokenizer(self.text, return_offsets_mapping=True)["offset_mapping"])
        longest = self.model.config.max_text_len
        if len(offsets) > longest:
            raise ValueError(f"{self.name} splits COCO's classes into {len(offsets)} tokens, but takes {longest}")
        ends = torch.tensor([len(name) + 2 for name in COCO_CLASSES]).cumsum(0)
        starts = ends - torch.tensor([len(name) + 2 for name in COCO_CLASSES])
        inside = (offsets[:, :1] >= starts) & (offsets[:, 1:] <= ends - 2) & (offsets[:, 1:] > offsets[:, :1])
        self.shares = (inside / inside.sum(0)).to(self.device)  # (tokens, classes)

    def _find(self, image: Image.Image) -> Found:
        inputs = self.processor(images=image, text=self.text, return_tensors="pt").to(self.device)
        out = self.model(**inputs)
        scores, labels = (out.logits[0, :, : len(self.shares)].sigmoid() @ self.shares).max(-1)
        size = torch.tensor([image.width, image.height] * 2, device=self.device)
        return scores, labels, box_convert(out.pred_boxes[0], "cxcywh", "xyxy") * size
