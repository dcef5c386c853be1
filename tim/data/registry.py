"""From `data` in a config to its samples: what each data_type is, which keys it needs, and datasets of one's own.

A data_type is a function whose arguments are keys of `data.dataset`: those without default must be set. To add one, write
its function, enter it below, and add its name to `tim.config.Data`. A dataset of one's own needs none of this:
`data.dataset.target` names its class, `data.dataset.params` its keywords (see `tim.data.replacement.LabelledSamples`).
"""

from collections.abc import Callable, Mapping
from inspect import signature
from typing import Any

from tim.config import Data, Target
from tim.data.c2i import Images, Latents, PackageDataset
from tim.data.folders import Folder
from tim.data.replacement import LabelledSamples
from tim.data.shards import Shards
from tim.data.t2i import CaptionedImages


def image_folders(image_dir: str, image_size: int, mirror: bool = True) -> Images:
    """`image_dir/<class>/<name>.*`."""
    return Images(Folder("image", image_dir), image_size, mirror)


def image_shards(shard_dir: str, image_size: int, index_dir: str | None = None, mirror: bool = True) -> Images:
    """Images in tar shards, each beside a .cls member with its label."""
    return Images(Shards(shard_dir, index_dir).need("image", "label"), image_size, mirror)


def latent_folders(
    latent_dir: str,
    image_dir: str | None = None,
    image_size: int | None = None,
    mirror: bool = True,
    num_classes: int | None = None,
) -> Latents:
    """`latent_dir/<class>/<name>.safetensors`, for REPA beside `image_dir/<class>/<name>.*`."""
    files = Folder("latent", latent_dir)
    if image_dir is not None:
        files.add_images(image_dir)
    return Latents(files, image_size, mirror, num_classes)


def latent_shards(
    shard_dir: str,
    image_size: int | None = None,
    index_dir: str | None = None,
    mirror: bool = True,
    num_classes: int | None = None,
) -> Latents:
    """Latent files in tar shards, for REPA each beside its image."""
    kinds = ("latent",) if image_size is None else ("latent", "image")
    return Latents(Shards(shard_dir, index_dir).need(*kinds), image_size, mirror, num_classes)


CLASS_CONDITIONAL: dict[str, Callable[..., LabelledSamples]] = {
    "latent": latent_folders,
    "image": image_folders,
    "latent_tar": latent_shards,
    "image_tar": image_shards,
    "package": PackageDataset,
}
TEXT_TO_IMAGE: dict[str, Callable[..., CaptionedImages]] = {"image_ms": CaptionedImages}
REPA_KEYS = ("image_dir", "image_size")  # optional ones say where the images beside latents are


def build_c2i_dataset(data: Data, with_image: bool = False, num_classes: int | None = None) -> LabelledSamples:
    """The class-conditional dataset a config names.

    Args:
        with_image: REPA is on, so latents come with their images.
        num_classes: of the network; labels that latent files hold must lie below it.

    Raises:
        ValueError, FileNotFoundError: for another data_type, missing keys, folders or files.
    """
    own = data.dataset.target
    if own is not None:
        samples: LabelledSamples = Target(own, data.dataset.params).build()
        if not isinstance(getattr(samples, "num_labels", None), int):
            raise ValueError(f"data.dataset.target={own!r} has no num_labels, see tim.data.replacement.LabelledSamples")
        return samples
    keys = _keys(data, CLASS_CONDITIONAL, "class-conditional")
    beside = [key for key in REPA_KEYS if keys.get(key, True) is False]
    if with_image and any(getattr(data.dataset, key) is None for key in beside):
        raise ValueError(f"REPA reads the images beside the latents: set data.dataset.{' and '.join(beside)}")
    taken = {key: getattr(data.dataset, key) for key in keys if with_image or key not in beside}
    kind = CLASS_CONDITIONAL[str(data.data_type)]
    if "num_classes" in signature(kind).parameters:
        taken["num_classes"] = num_classes
    return kind(**taken)


def build_t2i_dataset(data: Data, factor: int) -> CaptionedImages:
    """The text-to-image dataset a config names.

    Args:
        factor: pixels per token along a side: the autoencoder's factor times the network's patch size.

    Raises:
        ValueError, FileNotFoundError: for another data_type, missing keys, files or malformed lines.
    """
    keys = _keys(data, TEXT_TO_IMAGE, "text-to-image")
    return TEXT_TO_IMAGE[str(data.data_type)](factor=factor, **{key: getattr(data.dataset, key) for key in keys})


def _keys(data: Data, types: Mapping[str, Callable[..., Any]], task: str) -> dict[str, bool]:
    """The keys of data.dataset that the data_type reads, and whether it needs each; ValueError when one is missing."""
    kind = str(data.data_type)
    if kind not in types:
        raise ValueError(f"data.data_type={data.data_type!r} is not {task}; use {', '.join(types)}")
    arguments = signature(types[kind]).parameters.values()
    keys = {a.name: a.default is a.empty for a in arguments if hasattr(data.dataset, a.name)}
    for key, needed in keys.items():
        if needed and getattr(data.dataset, key) is None:
            raise ValueError(f"data.data_type={kind} needs data.dataset.{key}")
    return keys
