"""CLIP score: 100 x the cosine between an image and its prompt, over MJHQ-30K's categories."""

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from tim.evaluation.clip import Clip
from tim.evaluation.extract import BATCH, CACHE, extract
from tim.evaluation.inputs import ImageFiles, find_images, some
from tim.evaluation.mjhq import OVERALL, categories_of
from tim.evaluation.record import describe_samples
from tim.files import replacing
from tim.generation.prompt_sets import read_mjhq

TEXTS = 256  # prompts a batch


def write_text_features(metadata: Path, out: Path, clip: Clip, progress: bool = True) -> int:
    """Unit text features of MJHQ-30K's prompts as safetensors `category/key` -> (D,) float32, with the model's name.

    Returns:
        number of prompts.

    Raises:
        FileNotFoundError, ValueError: for a metadata file that is missing or not in MJHQ-30K's form.
    """
    names, prompts = read_mjhq(metadata)
    order = np.argsort([len(p) for p in prompts], kind="stable")  # similar lengths together waste no padding
    features: dict[str, Tensor] = {}
    for start in tqdm(range(0, len(order), TEXTS), desc="text", unit="batch", disable=not progress):
        places = order[start : start + TEXTS]
        for place, row in zip(places, clip.encode_texts([prompts[k] for k in places]).cpu(), strict=True):
            features[names[place]] = row.clone()
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as partial:
        save_file(features, partial, metadata={"clip": clip.identity["name"], "weights": _weights(clip)})
    return len(features)


def read_text_features(path: Path, clip: Clip) -> dict[str, Tensor]:
    """Features of `write_text_features`.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it is damaged, or of another model.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no text features {path}; calculate_clip.py META.json {path} --save-stats writes them")
    try:
        with safe_open(path, "pt") as file:
            made = file.metadata() or {}
            features = {key: file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118, not a dict
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors file: {error}") from error
    if made.get("weights", _weights(clip)) != _weights(clip):
        raise ValueError(
            f"{path} was made with other weights ({made.get('clip')}) than {clip.identity['name']}; "
            "make it again with --save-stats"
        )
    return features


def clip_score(
    text: dict[str, Tensor],
    folder: Path,
    clip: Clip,
    state: PartialState,
    cache: Path = CACHE,
    batch_size: int = BATCH,
    workers: int | None = None,
) -> dict[str, Any] | None:
    """Mean CLIP score of all images of a folder, overall and by category; images are squeezed to a square.

    Args:
        text: unit features by `category/key`, the image's path without its suffix.

    Returns:
        scores and facts on the main process, None on the others.

    Raises:
        FileNotFoundError, ValueError: for a folder without images, unreadable images, or images without a prompt (named).
    """
    files = find_images(folder)
    keys = [path.relative_to(folder).with_suffix("").as_posix() for path in files]
    _check_pairs(keys, text, folder)
    identity = {"network": "clip", **clip.identity, "resize": f"bicubic {clip.side}x{clip.side}"}
    features = extract(
        ImageFiles(files, clip.squash), lambda x: {"clip": clip.encode_images(x)}, identity, state, cache, batch_size, workers
    )
    if not state.is_main_process:
        return None
    wanted = torch.stack([text[key] for key in keys]).numpy()
    image = features.array("clip")
    if image.shape != wanted.shape:
        raise ValueError(f"text features have width {wanted.shape[1]}, the images' {image.shape[1]}: they are of other models")
    cosine = 100 * (image.astype(np.float64) * wanted).sum(axis=1)
    groups = {OVERALL: np.arange(len(files)), **categories_of(folder, files)}
    return {
        "scores": {name: float(cosine[places].mean()) for name, places in groups.items()},
        "n": len(files),
        "images_by_category": {name: len(places) for name, places in groups.items()},
        "missing_images": len(text.keys() - set(keys)),
        "clip": clip.identity,
        "resize": identity["resize"],
        "samples": describe_samples(folder, files) | {"images_per_second": features.images_per_second},
    }


def _check_pairs(keys: list[str], text: dict[str, Tensor], folder: Path) -> None:
    """Every image needs a prompt; prompts without an image are only said, since samples may be a part of the benchmark."""
    unknown = [key for key in keys if key not in text]
    if unknown:
        raise ValueError(f"{folder}: {some(unknown)} images have no prompt")
    if len(set(keys)) < len(keys):
        twice = sorted(key for key in set(keys) if keys.count(key) > 1)
        raise ValueError(f"{folder}: {some(twice)} prompts have several images")
    missing = sorted(text.keys() - set(keys))
    if missing:
        warnings.warn(f"{folder}: {some(missing)} of {len(text)} prompts have no image", stacklevel=3)


def _weights(clip: Clip) -> str:
    """What tells two models apart: the digests of local weights, else the name."""
    return json.dumps(clip.identity.get("weights_sha256") or clip.identity["name"], sort_keys=True)
