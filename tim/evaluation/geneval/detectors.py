"""The detector that a path or a hub id names."""

import pickle
from pathlib import Path

import torch

from tim.evaluation.geneval.detection import COCO_CLASSES, Detector
from tim.evaluation.geneval.mask2former import (
    NAME,
    Mask2FormerDetector,
    build_mask2former,
    prepare_image,
    swin_s_config,
)
from tim.files import sha256
from tim.models.loading import read_state_dict


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
        from tim.evaluation.geneval.pretrained import load_pretrained

        return load_pretrained(model_path, device)
    model = build_mask2former(_read(checkpoint), swin_s_config(), checkpoint)
    identity = {"name": f"{NAME} (mmdet weights)", "weights_sha256": {checkpoint.name: sha256(checkpoint)}}
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
