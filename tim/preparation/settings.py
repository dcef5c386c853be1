"""The YAML files of preprocessing: which images, which autoencoder, and how images are cut to size."""

import warnings
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from torch import Tensor

from tim.data.c2i import load_square
from tim.data.latents import classes_identity
from tim.data.t2i import fit
from tim.images import open_rgb, to_tensor
from tim.models.autoencoders import Autoencoder
from tim.preparation.buckets import native_size
from tim.typed_yaml import ConfigError, ImageSide, NotNegative

Dtype = Literal["float32", "float16", "bfloat16"]
Count = Annotated[int, ">= 1"]


@dataclass(kw_only=True)
class Settings:
    """One YAML file of preprocessing.

    vae_dir: diffusers folder or hub id. image_dir: class folders of images. latent_dir: default PROJECT_DIR/latents.
    batch_size: images per process encoded together, each with its mirror. statistics_files: latents, evenly spread, that
    the statistics are taken over.
    """

    vae_dir: str
    image_dir: str
    latent_dir: str | None = None
    seed: NotNegative = 0
    batch_size: Count = 32
    num_workers: NotNegative = 4
    vae_dtype: Dtype = "float32"
    vae_channels_last: bool = False
    latent_dtype: Dtype = "float32"
    allow_tf32: bool = True
    statistics_files: Count = 20000

    def identity(self, vae: Autoencoder, classes: list[str]) -> dict[str, Any]:
        """What the content of the files depends on, up to rounding; the names of the classes give the labels."""
        neutral = (
            "image_dir", "latent_dir", "batch_size", "num_workers", "allow_tf32", "vae_channels_last", "statistics_files",
        )  # fmt: skip
        kept = {key: value for key, value in asdict(self).items() if key not in neutral}
        autoencoder = {"scaling_factor": vae.scale, "shift": vae.shift}
        return {"kind": type(self).__name__, **kept, **autoencoder, **classes_identity(classes)}


@dataclass(kw_only=True)
class Square(Settings):
    """ADM's centre crop to image_size x image_size."""

    image_size: ImageSide
    one_size = True

    def check(self, vae: Autoencoder) -> None:
        """ValueError unless the autoencoder takes images of this size."""
        vae.latent_shape(self.image_size, self.image_size)

    def load(self, path: Path) -> Tensor:
        """(3, image_size, image_size) in [-1, 1]; ValueError when the file cannot be read."""
        return load_square(path, self.image_size, flip=False)


@dataclass(kw_only=True)
class Native(Settings):
    """Every image's own size: floored to multiples of min_size, from max_size² pixels on first scaled to that area."""

    min_size: ImageSide
    max_size: ImageSide
    one_size = False

    def check(self, vae: Autoencoder) -> None:
        """ValueError unless the autoencoder takes images of these sizes."""
        if self.max_size < self.min_size:
            raise ValueError(f"max_size={self.max_size} is less than min_size={self.min_size}")
        try:
            vae.latent_shape(self.min_size, self.min_size)
        except ValueError as error:
            raise ValueError(f"min_size={self.min_size} does not suit the autoencoder: {error}") from error

    def load(self, path: Path) -> Tensor:
        """(3, H, W) in [-1, 1], scaled and centre-cropped; ValueError when the file cannot be read or is too small."""
        image = open_rgb(path)
        height, width = native_size(image.height, image.width, self.max_size, self.min_size)
        if not height or not width:
            raise ValueError(f"{path} has {image.width}x{image.height} pixels, too few for min_size={self.min_size}")
        return to_tensor(fit(image, height, width, "crop"))


def from_published(tree: Any, kind: type[Square] | type[Native]) -> Any:
    """The keys of `kind` out of the published form of the file, `model.vae` and `data.dataset`; other forms are left alone.

    Keys there that say nothing here are ignored with a warning.
    """
    if not isinstance(tree, dict) or not {"model", "data"} <= tree.keys():
        return tree
    data = tree["data"] if isinstance(tree["data"], dict) else {"dataset": tree["data"]}
    size = "max_size" if kind is Native else "image_size"
    names = {"vae": "vae_dir", "data_dir": "image_dir", "target_dir": "latent_dir", "resolution": size}
    own = {f.name for f in fields(kind)}
    flat = {key: value for key, value in tree.items() if key not in ("model", "data")}
    for section in (tree["model"], data.get("dataset") or {}, data.get("dataloader") or {}):
        if not isinstance(section, dict):
            raise ConfigError(f"model, data.dataset and data.dataloader must be mappings, got {section!r}")
        for key, value in section.items():
            if names.get(key, key) in own:
                flat[names.get(key, key)] = value
            else:
                warnings.warn(f"{key} has no effect in preprocessing and is ignored", stacklevel=2)
    return flat
