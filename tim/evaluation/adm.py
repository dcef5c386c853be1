"""The ADM suite: FID, sFID, inception score, precision and recall of Inception-2015 features (Dhariwal & Nichol 2021)."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tim.evaluation.extract import Extraction, FeatureExtractor, Features
from tim.evaluation.inception import TENSORFLOW_RESIZE, InceptionV3
from tim.evaluation.inputs import ImageFiles, as_uint8_tensor, npz_arrays, npz_names, open_images
from tim.evaluation.metrics import NEIGHBOURS, Statistics, distance, inception_score, precision_recall
from tim.evaluation.results import columns, describe_samples, keeping
from tim.evaluation.samples import check_complete, read_run, sampled_images
from tim.files import sha256

REFERENCE_ROWS = 10_000  # real images in precision and recall, as many as ADM's reference batches hold
STATISTICS = {"pool3": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}  # names in ADM's reference batches
SCORES = {"fid": "FID", "sfid": "sFID", "inception_score": "IS", "precision": "Precision", "recall": "Recall"}
ORDER = ("fid", "sfid", "inception_score", "inception_score_std", "precision", "recall")  # in the result


@dataclass
class ImageSet:
    """One side of a comparison.

    Attributes:
        statistics: by name of a feature (ADM) or of a category (MJHQ-30K); empty on other processes than the main.
        facts: for the result.
        features: None where there are no images.
    """

    statistics: dict[str, Statistics]
    facts: dict[str, Any]
    features: Features | None = None


def adm_extractor(network: InceptionV3) -> FeatureExtractor:
    """pool3, spatial features (sFID: Nash et al. 2021) and class probabilities; the network resizes as ADM's graph does."""
    identity = network.identity(TENSORFLOW_RESIZE, "pool3, spatial, probs")
    return FeatureExtractor("Inception-2015-12-05", identity, as_uint8_tensor, network)


def read_statistics(path: Path, pairs: Mapping[str, tuple[str, str]] = STATISTICS) -> dict[str, Statistics]:
    """Ready statistics of an `.npz`, as far as it holds them.

    Args:
        pairs: names of mean and covariance in the file by the name of what they describe, by default those of ADM.

    Raises:
        ValueError: for a damaged file, or arrays that are no mean and covariance.
    """
    names, found = npz_names(path), {}
    for feature, pair in pairs.items():
        if all(name in names for name in pair):
            mean, cov = npz_arrays(path, pair)
            found[feature] = Statistics.checked(mean, cov, path, pair)
    return found


def read_side(path: Path, how: Extraction, desc: str, files: Sequence[Path] | None = None) -> ImageSet:
    """Statistics and features of a folder of images or an `.npz` with arr_0 and/or statistics.

    Args:
        files: the images of a folder that count; all when None.

    Raises:
        FileNotFoundError, ValueError: when there is neither, or the images cannot be read; the message names them.
    """
    progress = how.state.is_main_process
    ready: dict[str, Statistics] = {}
    if path.is_file():
        ready = read_statistics(path)
        if "arr_0" not in npz_names(path):
            if not ready:
                raise ValueError(f"{path} holds neither images (arr_0) nor statistics (mu, sigma)")
            return ImageSet(ready, {"path": str(path), "sha256": sha256(path), "n": None})
    images = open_images(path, how.cache, progress, files)
    features = how.run(images, desc)
    facts = describe_samples(path, images.files) if isinstance(images, ImageFiles) else {"path": str(path), "n": len(images)}
    if path.is_file() and progress:
        facts["sha256"] = sha256(path)
    if not progress:  # one process computes the scores
        return ImageSet({}, facts, features)
    if len(features) > 1:  # one image has no covariance
        ready |= {name: features.statistics(name) for name in STATISTICS if name not in ready}
    return ImageSet(ready, facts | {"images_per_second": features.images_per_second}, features)


def evaluate(reference: Path, samples: Path, how: Extraction, allow_partial: bool = False) -> dict[str, Any] | None:
    """All scores of `samples` against `reference`; what the two sides cannot give is None, with a warning.

    Returns:
        scores and facts on the main process, None on the others; `failed` says by score what went wrong.

    Raises:
        FileNotFoundError, ValueError: see `read_side`; also when the samples are statistics without images, or of a
            sampling run that is not finished, unless `allow_partial`.
    """
    if not samples.exists():
        raise FileNotFoundError(f"{samples} is neither a folder of images nor an .npz")
    files = sampled_images(samples, allow_partial) if samples.is_dir() else None
    if files is None:
        if "arr_0" not in npz_names(samples):
            raise ValueError(f"{samples} holds no images (arr_0); samples must be a folder or an .npz of images")
        drawn = len(open_images(samples, how.cache))
        check_complete(samples, read_run(samples.with_name(samples.name.removesuffix(".npz"))), drawn, allow_partial)
    real = read_side(reference, how, "reference")
    fake = read_side(samples, how, "samples", files)
    if not how.state.is_main_process or fake.features is None:
        return None
    scores: dict[str, float | None] = dict.fromkeys(ORDER)
    failed: dict[str, str] = {}
    for score, feature in (("fid", "pool3"), ("sfid", "spatial")):
        with keeping(failed, SCORES[score]):
            if feature not in real.statistics:
                what = f"{reference} holds neither two images nor {' and '.join(STATISTICS[feature])}"
                warnings.warn(f"no {SCORES[score]}: {what}", stacklevel=2)
            elif feature not in fake.statistics:
                warnings.warn(f"no {SCORES[score]}: {samples} holds a single image", stacklevel=2)
            else:
                scores[score] = distance(fake.statistics[feature], real.statistics[feature], SCORES[score])
    with keeping(failed, SCORES["inception_score"]):
        scores["inception_score"], scores["inception_score_std"] = inception_score(fake.features.array("probs"))
    with keeping(failed, "precision and recall"):
        if real.features is None:
            warnings.warn(f"no precision and recall: {reference} holds no images (arr_0)", stacklevel=2)
        elif (fewest := min(len(fake.features), len(real.features))) <= NEIGHBOURS:
            warnings.warn(
                f"no precision and recall: a side has {fewest} images, {NEIGHBOURS} neighbours need more", stacklevel=2
            )
        else:
            rows = reference_rows(len(real.features))
            real.facts["rows_of_precision_recall"] = len(rows)
            pool3 = fake.features.array("pool3"), real.features.array("pool3")[rows]
            found = precision_recall(*pool3, device=how.state.device)
            scores["precision"], scores["recall"] = found.precision, found.recall
    return result_of_features(scores, how.extractor, fake, real, failed=failed)


def result_of_features(
    scores: Mapping[str, float | None], extractor: FeatureExtractor, samples: ImageSet, reference: ImageSet, **more: Any
) -> dict[str, Any]:
    """Scores, what they are made of, and where both sides come from; `more` follows the number of samples."""
    return {
        "scores": scores,
        "n": samples.facts["n"],
        **more,
        "features": extractor.name,
        "weights_sha256": extractor.identity["weights_sha256"],
        "resize": extractor.identity["resize"],
        "precision_of_features": extractor.identity["precision"],
        "samples": samples.facts,
        "reference": reference.facts,
    }


def reference_rows(count: int) -> np.ndarray:
    """Rows of the reference in precision and recall: all, or `REFERENCE_ROWS` evenly spaced ones (folders go by class)."""
    return np.linspace(0, count - 1, min(count, REFERENCE_ROWS)).round().astype(int)


def table(result: dict[str, Any]) -> str:
    """The scores as text."""
    scores = result["scores"]
    values = ["n/a" if scores[key] is None else f"{scores[key]:.4f}" for key in SCORES]
    return columns([[*SCORES.values(), "images"], [*values, result["n"]]], [*[">10"] * len(SCORES), ">8"])
