"""REPA features made once: `features_dir/<class>/<name>.safetensors` with `features` (2, N, D), of an image and its mirror.

features.json in features_dir says what they depend on; `tim.preparation.feature_cache` writes both.
"""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tim.config import Config, Dataset, Model
from tim.data import latents
from tim.data.c2i import Images, Latents
from tim.data.folders import Folder, find_beside
from tim.data.replacement import LabelledSamples
from tim.digests import cached_sha256
from tim.files import claim, read_json, write_tensors

RECORD = "features.json"


def has_features(config: Config) -> bool:
    """Whether a run takes its REPA features from files; warns when it is given files and trains without REPA."""
    if config.data.dataset.features_dir is None:
        return False
    if config.model.enc_dir is None:
        warnings.warn("data.dataset.features_dir is not read: model.enc_dir=null trains without REPA", stacklevel=2)
    return config.model.enc_dir is not None


class CachedFeatures:
    """Samples of a dataset with `features` (N, D), those of the mirror where the sample is mirrored.

    Args:
        samples: class-conditional images or latents.
        dataset: the configured keys; features_dir is read here.
        model: the configured keys; its encoder must be the one that made the features, in the same way.

    Raises:
        FileNotFoundError: when the folder, its record or the file of a sample is missing.
        ValueError: when the features were made by another encoder or at another image_size, or samples are not in folders.
    """

    def __init__(self, samples: LabelledSamples, dataset: Dataset, model: Model) -> None:
        files = samples.files if isinstance(samples, Images | Latents) else None
        if not isinstance(files, Folder):
            raise ValueError("data.dataset.features_dir needs images or latents in class folders")
        self.samples, self.num_labels = samples, samples.num_labels
        self.class_names = getattr(samples, "class_names", None)
        root = Path(str(dataset.features_dir))
        if not (root / RECORD).is_file():
            raise FileNotFoundError(
                f"no {root / RECORD} (data.dataset.features_dir); make the features with tools/cache_radio_features.py"
            )
        enc_dir = str(model.encoder_file)
        if not Path(enc_dir).is_file():
            raise FileNotFoundError(f"model.enc_dir: no RADIO checkpoint {enc_dir}, which must be the one of features_dir")
        wanted: dict[str, Any] = {"encoder_sha256": cached_sha256(enc_dir)}
        if dataset.image_size is not None:
            wanted["image_size"] = dataset.image_size
        claim(root / RECORD, wanted, "features", "use another folder", write=False)
        record = read_json(root / RECORD)
        if record.get("antialias", True) != model.enc_antialias:  # files from before there was a choice say nothing
            raise ValueError(
                f"{root} holds features made with model.enc_antialias={not model.enc_antialias}; set it so, or make them anew"
            )
        self.shape = (2, record["tokens"], record["width"])
        paths = files.paths[files.kind]
        found = find_beside(paths, root, "features")
        missing = [path for path in paths if path not in found]
        if missing:
            raise FileNotFoundError(
                f"{len(missing)} of {len(paths)} samples have no file in {root}, the first is {missing[0]}; run "
                "tools/cache_radio_features.py again, and leave out images that it cannot read"
            )
        self.paths = list(found.values())

    def __len__(self) -> int:
        return len(self.samples)

    def load(self, index: int, g: np.random.Generator) -> dict[str, Any]:
        """The sample and its features.

        Raises:
            ValueError: when the file of features is damaged or has another shape; the message names it.
        """
        sample = self.samples.load(index, g)
        return {**sample, "features": read_features(self.paths[index], self.shape, int(sample["mirrored"]))}


def check_features(features: Tensor, latent: Sequence[int], patch_size: int, z_dim: int | None) -> None:
    """ValueError unless features (N, D) have one row per token of latents (C, h, w), of the projector's width `z_dim`."""
    wanted = (latent[1] // patch_size * (latent[2] // patch_size), z_dim)
    if tuple(features.shape) != wanted:
        raise ValueError(
            f"data.dataset.features_dir holds {features.shape[0]} features of width {features.shape[1]} for each image; "
            f"latents {tuple(latent)}, patch_size={patch_size} and z_dim={z_dim} need {wanted[0]} of width {z_dim}. Make them "
            "anew with this config, or mend model.network.params.z_dim"
        )


def read_features(path: Path, shape: Sequence[int], mirror: int) -> Tensor:
    """Features (N, D) of an image (mirror=0) or its mirror (1), in the stored dtype.

    Raises:
        ValueError: when the file is missing, damaged, of another shape than (2, N, D), or holds values that are not finite.
    """
    try:
        with latents.opened(path) as f:
            features = _features(f, shape)[mirror]
            if not torch.isfinite(features).all():
                raise ValueError("it holds non-finite values")
            return features
    except ValueError as error:
        raise ValueError(f"{path} is not a file of features: {error}") from error


def find_corruption(path: Path, shape: Sequence[int]) -> str | None:
    """Why a file does not hold `features` of this shape, or None; the size of the file is compared with its header."""
    return latents.find_corruption(path, lambda f: _features(f, shape))


def write_features(path: Path, features: Tensor) -> None:
    """Write features (2, N, D) so that the file is either whole or absent.

    Raises:
        OSError: when what reached the disk is not what was written.
    """
    write_tensors(path, {"features": features.contiguous()}, lambda partial: find_corruption(partial, features.shape))


def _features(f: Any, shape: Sequence[int]) -> Any:
    """The features of an open file, not yet read; ValueError when they have another shape, or are no floats."""
    features = f.get_slice("features")
    found, dtype = tuple(features.get_shape()), features.get_dtype()
    if found != tuple(shape) or dtype not in latents.FLOATS.values():
        raise ValueError(f"features are {found} {dtype} instead of {tuple(shape)} of floats")
    return features
