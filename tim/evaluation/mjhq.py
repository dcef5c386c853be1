"""MJHQ-30K: FID over all images and for each category, under one of three ways to resize."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as nnf
from PIL import Image
from torch import Tensor

from tim.evaluation.adm import Extraction
from tim.evaluation.extract import Features, extract
from tim.evaluation.inception import tensorflow_resize
from tim.evaluation.inputs import ImageFiles, find_images, npz_arrays, npz_names
from tim.evaluation.metrics import Statistics, distance, streaming_statistics
from tim.evaluation.record import describe_samples
from tim.files import replacing, sha256

SIDE = 299  # pixels, Inception's input
OVERALL = "overall"


def antialiased_bilinear(pixels: np.ndarray) -> Tensor:
    """uint8 (H, W, 3) to (3, 299, 299) in [0, 255]: ToTensor, then bilinear with antialiasing."""
    x = torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1)[None] / 255
    return 255 * nnf.interpolate(x, (SIDE, SIDE), mode="bilinear", antialias=True, align_corners=False)[0]


def pillow_bicubic(pixels: np.ndarray) -> Tensor:
    """uint8 (H, W, 3) to (3, 299, 299) in [0, 255]: Pillow's bicubic on float channels (Parmar et al. 2022)."""
    channels = [Image.fromarray(pixels[:, :, c].astype(np.float32)) for c in range(3)]
    resized = [np.asarray(c.resize((SIDE, SIDE), Image.Resampling.BICUBIC)).clip(0, 255) for c in channels]
    return torch.from_numpy(np.stack(resized))


PROTOCOLS: dict[str, tuple[Callable[[np.ndarray], Tensor], str]] = {
    "tim": (antialiased_bilinear, "antialiased bilinear 299x299"),
    "clean": (pillow_bicubic, "Pillow bicubic 299x299 on float channels"),
    "torch-fidelity": (tensorflow_resize, "tensorflow bilinear 299x299"),
}


@dataclass
class ImageSet:
    """Statistics by category, `overall` among them, and facts for the record."""

    statistics: dict[str, Statistics]
    facts: dict[str, Any]

    def counts(self) -> dict[str, int | None]:
        """Images by category."""
        return {name: found.count for name, found in self.statistics.items()}


def categories_of(folder: Path, files: list[Path]) -> dict[str, np.ndarray]:
    """Places of each category's images (first folder of the path); empty for a folder without subfolders."""
    names = [path.relative_to(folder).parts for path in files]
    found: dict[str, list[int]] = {}
    for place, parts in enumerate(names):
        if len(parts) > 1:
            found.setdefault(parts[0], []).append(place)
    return {name: np.array(places) for name, places in sorted(found.items())}


def read_set(path: Path, protocol: str, how: Extraction, desc: str) -> ImageSet:
    """Statistics of a folder of images, or those that `save_statistics` wrote.

    Raises:
        FileNotFoundError, ValueError: for a missing or empty folder, unreadable images (named), or statistics of
            another protocol or other weights.
    """
    if path.suffix == ".npz":
        return load_statistics(path, protocol, how.network.weights_sha256)
    files = find_images(path)
    transform, resize = PROTOCOLS[protocol]
    identity = {
        "network": "inception-2015-12-05, pool3",
        "weights_sha256": how.network.weights_sha256,
        "resize": resize,
        "precision": how.precision,
    }
    features = extract(
        ImageFiles(files, transform),
        lambda x: {"pool3": how.network.features_299(x)["pool3"]},
        identity, how.state, how.cache, how.batch_size, how.workers, desc,
    )  # fmt: skip
    facts = describe_samples(path, files) | {"images_per_second": features.images_per_second}
    if not how.state.is_main_process:
        return ImageSet({}, facts)
    groups = {OVERALL: np.arange(len(files))} | {k: v for k, v in categories_of(path, files).items() if len(v) > 1}
    return ImageSet({name: _statistics(features, places) for name, places in groups.items()}, facts)


def _statistics(features: Features, places: np.ndarray) -> Statistics:
    """Statistics of the images at `places`, in ascending order."""

    def parts():
        for index, part in enumerate(features.parts("pool3")):
            rows = features.rows(index)
            own = places[(places >= rows.start) & (places < rows.stop)] - rows.start
            if len(own):
                yield part[own]

    return streaming_statistics(parts)


def save_statistics(path: Path, images: ImageSet, protocol: str, weights_sha256: str) -> None:
    """Write all statistics, the protocol and the weights' digest to an `.npz`; `mu` and `sigma` are those of all images."""
    arrays: dict[str, Any] = {"protocol": protocol, "weights_sha256": weights_sha256}
    for name, found in images.statistics.items():
        prefix = "" if name == OVERALL else f"{name}/"
        arrays |= {f"{prefix}mu": found.mean, f"{prefix}sigma": found.cov, f"{prefix}n": found.count}
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial, open(partial, "wb") as f:
        np.savez(f, **arrays)


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
        if key in names:
            found = str(npz_arrays(path, [key])[0])
            if found != wanted:
                raise ValueError(f"{path} was made with {key} {found}, now {wanted}; make it again with --save-stats")
    if not {"mu", "sigma"} <= set(names):
        raise ValueError(f"{path} holds no statistics (mu, sigma)")
    statistics = {}
    for prefix in sorted(name.removesuffix("mu") for name in names if name.endswith("mu")):
        mean, cov = npz_arrays(path, [f"{prefix}mu", f"{prefix}sigma"])
        found = Statistics.checked(mean, cov, f"{path}: {prefix}mu and {prefix}sigma")
        if f"{prefix}n" in names:
            found.count = int(npz_arrays(path, [f"{prefix}n"])[0])
        statistics[prefix.rstrip("/") or OVERALL] = found
    return ImageSet(statistics, {"path": str(path), "sha256": sha256(path), "n": statistics[OVERALL].count})


def compare(reference: ImageSet, samples: ImageSet) -> dict[str, float]:
    """FID overall and of every category.

    Raises:
        ValueError: names categories that one side alone has.
    """
    alone = sorted(reference.statistics.keys() ^ samples.statistics.keys())
    one_flat = min(len(reference.statistics), len(samples.statistics)) == 1
    if alone and not one_flat:
        side = "samples" if alone[0] in samples.statistics else "reference"
        raise ValueError(f"categories differ: {', '.join(alone)} (the first is in the {side} alone)")
    shared = [name for name in samples.statistics if name in reference.statistics]
    return {name: distance(samples.statistics[name], reference.statistics[name], f"FID {name}") for name in shared}


def record(scores: dict[str, float], reference: ImageSet, samples: ImageSet, protocol: str, how: Extraction) -> dict[str, Any]:
    """The result file's content: scores by category and where they come from."""
    return {
        "scores": scores,
        "n": samples.facts["n"],
        "images_by_category": samples.counts(),
        "features": "Inception-2015-12-05 pool3",
        "weights_sha256": how.network.weights_sha256,
        "resize": PROTOCOLS[protocol][1],
        "precision_of_features": how.precision,
        "samples": samples.facts,
        "reference": reference.facts,
    }


def table(scores: dict[str, float], metric: str, counts: dict[str, int | None]) -> str:
    """Scores by category as text, overall last."""
    width = max(len(name) for name in scores)
    ordered = [*(k for k in scores if k != OVERALL), OVERALL]
    lines = [f"{'category':<{width}} {'images':>8} {metric:>10}"]
    lines += [f"{k:<{width}} {'-' if counts.get(k) is None else counts[k]:>8} {scores[k]:>10.4f}" for k in ordered]
    return "\n".join(lines)
