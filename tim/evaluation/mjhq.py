"""MJHQ-30K: FID under one of three ways to resize, and CLIP score, over all images and for each category."""

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as nnf
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from tim.evaluation.adm import ImageSet, read_statistics, result_of_features
from tim.evaluation.clip import Clip
from tim.evaluation.extract import Extraction, FeatureExtractor
from tim.evaluation.inception import SIDE, TENSORFLOW_RESIZE, tensorflow_resize
from tim.evaluation.inputs import Transform, find_images, npz_arrays, npz_names, some, write_npz
from tim.evaluation.metrics import distance
from tim.evaluation.results import columns, describe_samples, keeping, warn_of_replacing
from tim.evaluation.samples import BY_CATEGORY, check_prompts, sampled_images
from tim.files import replacing, sha256
from tim.generation.prompt_sets import read_mjhq
from tim.images import IMAGE_SUFFIXES

OVERALL = "overall"
TEXTS = 256  # prompts a batch


def antialiased_bilinear(pixels: np.ndarray) -> Tensor:
    """uint8 (H, W, 3) to (3, 299, 299) in [0, 255]: ToTensor, then bilinear with antialiasing."""
    x = torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1)[None] / 255
    return 255 * nnf.interpolate(x, (SIDE, SIDE), mode="bilinear", antialias=True, align_corners=False)[0]


def pillow_bicubic(pixels: np.ndarray) -> Tensor:
    """uint8 (H, W, 3) to (3, 299, 299) in [0, 255]: Pillow's bicubic on float channels (Parmar et al. 2022)."""
    channels = [Image.fromarray(pixels[:, :, c].astype(np.float32)) for c in range(3)]
    resized = [np.asarray(c.resize((SIDE, SIDE), Image.Resampling.BICUBIC)).clip(0, 255) for c in channels]
    return torch.from_numpy(np.stack(resized))


RESIZES: dict[str, tuple[Transform, str]] = {  # by protocol
    "tim": (antialiased_bilinear, "antialiased bilinear 299x299"),
    "clean": (pillow_bicubic, "Pillow bicubic 299x299 on float channels"),
    "torch-fidelity": (tensorflow_resize, TENSORFLOW_RESIZE),
}


def places_of(folder: Path, files: list[Path]) -> dict[str, np.ndarray]:
    """Places of all images (`overall`), then of each category's: the first folder of their paths."""
    found: dict[str, list[int]] = {}
    for place, path in enumerate(files):
        category, *rest = path.relative_to(folder).parts
        if rest:
            found.setdefault(category, []).append(place)
    return {OVERALL: np.arange(len(files))} | {name: np.array(places) for name, places in sorted(found.items())}


def read_set(path: Path, protocol: str, how: Extraction, desc: str, files: list[Path] | None = None) -> ImageSet:
    """Statistics of a folder of images, or those that `save_statistics` wrote.

    Args:
        files: the images of a folder that count; all when None.

    Raises:
        FileNotFoundError, ValueError: for a missing or empty folder, unreadable images (named), or statistics of
            another protocol or other weights.
    """
    if path.suffix == ".npz":
        return load_statistics(path, protocol, how.extractor.identity["weights_sha256"])
    files = find_images(path) if files is None else files
    if len(files) < 2:
        raise ValueError(f"{path} holds a single image; a Fréchet distance needs two at least")
    features = how.run_files(files, desc)
    facts = describe_samples(path, files) | {"images_per_second": features.images_per_second}
    if not how.state.is_main_process:
        return ImageSet({}, facts)
    # a single image has no covariance: its category counts in the overall score alone
    groups = {name: places for name, places in places_of(path, files).items() if len(places) > 1 or name == OVERALL}
    return ImageSet({name: features.statistics("features", places) for name, places in groups.items()}, facts)


def save_statistics(path: Path, images: ImageSet, protocol: str, weights_sha256: str) -> None:
    """Write all statistics, the protocol and the weights' digest to an `.npz`; `mu` and `sigma` are those of all images."""
    warn_of_replacing(path)
    arrays: dict[str, Any] = {"protocol": protocol, "weights_sha256": weights_sha256}
    for name, found in images.statistics.items():
        prefix = "" if name == OVERALL else f"{name}/"
        arrays |= {f"{prefix}mu": found.mean, f"{prefix}sigma": found.cov}
        if found.count is not None:
            arrays[f"{prefix}n"] = found.count
    write_npz(path, arrays)


def load_statistics(path: Path, protocol: str, weights_sha256: str) -> ImageSet:
    """Statistics of `save_statistics`, or of any `.npz` with mu and sigma.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it is damaged, or of another protocol or other weights.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no statistics file {path}")
    names = npz_names(path)
    for key, wanted in (("protocol", protocol), ("weights_sha256", weights_sha256)):
        if key in names and (made := str(npz_arrays(path, [key])[0])) != wanted:
            raise ValueError(f"{path} was made with {key} {made}, now {wanted}; make it again with --save-stats")
    if not {"mu", "sigma"} <= set(names):
        raise ValueError(f"{path} holds no statistics (mu, sigma)")
    prefixes = {prefix.rstrip("/") or OVERALL: prefix for prefix in sorted(k[:-2] for k in names if k.endswith("mu"))}
    statistics = read_statistics(path, {name: (f"{prefix}mu", f"{prefix}sigma") for name, prefix in prefixes.items()})
    for name, found in statistics.items():
        if (key := f"{prefixes[name]}n") in names:
            found.count = _count(path, key)
    return ImageSet(statistics, {"path": str(path), "sha256": sha256(path), "n": statistics[OVERALL].count})


def _count(path: Path, key: str) -> int:
    """Number of images behind statistics."""
    (value,) = npz_arrays(path, [key])
    if value.shape != () or value.dtype.kind not in "iu":
        raise ValueError(f"{path}: {key} is no number of images: {value.dtype} {value.shape}; make it again with --save-stats")
    return int(value)


def fid_result(reference: ImageSet, samples: ImageSet, extractor: FeatureExtractor) -> dict[str, Any]:
    """The result: FID overall and of every category that both sides have, and where it comes from.

    `failed` says what went wrong, as with categories that one side alone has.
    """
    real, drawn = reference.statistics, samples.statistics
    failed: dict[str, str] = {}
    alone = sorted(real.keys() ^ drawn.keys())
    # one folder may have no categories, as where they were not kept; then only the overall scores compare
    if alone and min(len(real), len(drawn)) > 1:
        side = "samples" if alone[0] in drawn else "reference"
        failed["categories differ"] = f"{', '.join(alone)} (the first is in the {side} alone)"
    scores: dict[str, float] = {}
    for name in drawn:
        if name in real:
            with keeping(failed, f"FID {name}"):
                scores[name] = distance(drawn[name], real[name], f"FID {name}")
    counts = {name: found.count for name, found in drawn.items()}
    return result_of_features(scores, extractor, samples, reference, images_by_category=counts, failed=failed)


def table(result: dict[str, Any], metric: str) -> str:
    """Scores by category as text, overall last."""
    scores, counts = result["scores"], result["images_by_category"]
    ordered = sorted(scores, key=lambda k: k == OVERALL)
    rows = [[k, "-" if counts.get(k) is None else counts[k], f"{scores[k]:.4f}"] for k in ordered]
    return columns([["category", "images", metric], *rows], [f"<{max(map(len, scores))}", ">8", ">10"])


def write_text_features(metadata: Path, out: Path, clip: Clip) -> int:
    """Unit text features of MJHQ-30K's prompts as safetensors `category/key` -> (D,) float32, with the model's name.

    Returns:
        number of prompts.

    Raises:
        FileNotFoundError, ValueError: for a metadata file that is missing or not in MJHQ-30K's form.
    """
    names, prompts = read_mjhq(metadata)
    order = np.argsort([len(p) for p in prompts], kind="stable")  # similar lengths together waste no padding
    features: dict[str, Tensor] = {}
    for start in tqdm(range(0, len(order), TEXTS), desc="text", unit="batch"):
        places = order[start : start + TEXTS]
        for place, row in zip(places, clip.encode_texts([prompts[k] for k in places]).cpu(), strict=True):
            features[names[place]] = row.clone()
    out.parent.mkdir(parents=True, exist_ok=True)
    warn_of_replacing(out)
    with replacing(out) as partial:
        save_file(features, partial, metadata={"clip": clip.identity["name"], "weights": _weights(clip)})
    return len(features)


def read_text_features(path: Path, clip: Clip) -> dict[str, Tensor]:
    """Features of `write_text_features`, or of a file of others, whose keys may end in .jpg, brought to unit length.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it is damaged, or of another model.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no text features {path}; calculate_clip.py META.json {path} --save-stats writes them")
    if path.suffix == ".json":
        raise ValueError(f"{path} are prompts; calculate_clip.py {path} F.safetensors --save-stats writes their features first")
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
    broken = [key for key, row in features.items() if not row.numel() or not row.isfinite().all()]
    if broken or not features:
        raise ValueError(f"{path}: {some(broken)} text features are empty or not finite; make it again with --save-stats")
    if "weights" in made:
        return features
    warnings.warn(f"{path} does not say which CLIP made it; {clip.identity['name']} is taken", stacklevel=2)
    return {_without_suffix(key): nnf.normalize(row.flatten(), dim=0) for key, row in features.items()}


def _without_suffix(key: str) -> str:
    """`category/key` of `category/key.jpg`."""
    path = Path(key)
    return path.with_suffix("").as_posix() if path.suffix.lower() in IMAGE_SUFFIXES else key


def clip_extractor(clip: Clip) -> FeatureExtractor:
    """CLIP's unit vectors of images, squeezed to a square."""
    identity = {"network": "clip", **clip.identity, "resize": f"bicubic {clip.side}x{clip.side}"}
    return FeatureExtractor("CLIP", identity, clip.squash, lambda x: {"features": clip.encode_images(x)})


def clip_score(
    text: dict[str, Tensor], folder: Path, clip: Clip, how: Extraction, allow_partial: bool = False
) -> dict[str, Any] | None:
    """CLIP score, 100 x the cosine between an image and its prompt (Hessel et al. 2021), overall and by category.

    Args:
        text: unit features by `category/key`, the image's path without its suffix.
        how: extraction with `clip_extractor` of the same model.

    Returns:
        mean scores and facts on the main process, None on the others.

    Raises:
        FileNotFoundError, ValueError: for a folder without images, unreadable images, images without a prompt (named), text
            features of another width, or a folder that is not complete, unless `allow_partial`.
    """
    files = sampled_images(folder, allow_partial, (BY_CATEGORY,))
    keys = [path.relative_to(folder).with_suffix("").as_posix() for path in files]
    _check_pairs(keys, text, folder, allow_partial)
    features = how.run_files(files, "features")
    if not how.state.is_main_process:
        return None
    image = features.array("features")
    other = [f"{key} {tuple(text[key].shape)}" for key in keys if text[key].shape != image.shape[1:]]
    if other:
        raise ValueError(f"text features are of another model than the images', which have {image.shape[1]}: {some(other)}")
    wanted = torch.stack([text[key] for key in keys]).numpy()
    cosine = 100 * (image.astype(np.float64) * wanted).sum(axis=1)
    groups = places_of(folder, files)
    return {
        "scores": {name: float(cosine[places].mean()) for name, places in groups.items()},
        "n": len(files),
        "images_by_category": {name: len(places) for name, places in groups.items()},
        "missing_images": len(text.keys() - set(keys)),
        "clip": clip.identity,
        "resize": how.extractor.identity["resize"],
        "samples": describe_samples(folder, files) | {"images_per_second": features.images_per_second},
    }


def _check_pairs(keys: list[str], text: dict[str, Tensor], folder: Path, allow_partial: bool) -> None:
    """Every image needs a prompt; prompts without an image are only said where a sampling run is known to be finished."""
    unknown = [key for key in keys if key not in text]
    if unknown:
        raise ValueError(f"{folder}: {some(unknown)} images have no prompt")
    if len(set(keys)) < len(keys):
        twice = sorted(key for key in set(keys) if keys.count(key) > 1)
        raise ValueError(f"{folder}: {some(twice)} prompts have several images")
    missing = sorted(text.keys() - set(keys))
    if missing:
        check_prompts(folder, f"{some(missing)} of {len(text)} prompts have no image", allow_partial)


def _weights(clip: Clip) -> str:
    """What tells two models apart: the digests of local weights, else the name."""
    return json.dumps(clip.identity.get("weights_sha256") or clip.identity["name"], sort_keys=True)
