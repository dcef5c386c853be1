"""REPA features of a class folder of images, once, on any number of processes.

Files depend neither on the number of processes nor on interruptions; see `tim.preparation.encoding`.
"""

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from tim.config import Config
from tim.data.c2i import load_square
from tim.data.features import RECORD, find_corruption, write_features
from tim.data.registry import build_c2i_dataset
from tim.data.replacement import PROBED, first_readable
from tim.digests import cached_sha256
from tim.distributed import set_tf32
from tim.files import claim
from tim.models.autoencoders import Autoencoder
from tim.models.network import traits_of
from tim.models.radio import Radio
from tim.preparation.encoding import FolderEncoder, Source


class FeatureEncoder(FolderEncoder):
    """RADIO's features of every image of data.dataset.image_dir and of its mirror.

    Args:
        config: a training configuration; it names the images and the encoder, and its network and latents say how many
            tokens an image has.
        features_dir, dtype: where the files go, and their precision: float16, bfloat16 or float32.
        batch_size, num_workers: see `FolderEncoder`.

    Raises:
        ValueError, FileNotFoundError: for what the user can mend, such as keys, images or an encoder that are missing.
    """

    what = "features"

    def __init__(self, config: Config, features_dir: str | Path, dtype: str, batch_size: int, num_workers: int) -> None:
        d, enc_dir = config.data.dataset, config.model.encoder_file
        if enc_dir is None or d.image_dir is None or d.image_size is None:
            raise ValueError("caching features needs model.enc_dir, data.dataset.image_dir and data.dataset.image_size")
        load = partial(load_square, size=d.image_size, flip=False)
        super().__init__(d.image_dir, Path(features_dir), load, batch_size, True, num_workers)
        set_tf32(config.training.allow_tf32)
        self.grid, self.dtype, enc_dtype = token_grid(config), dtype, config.model.enc_dtype or "float32"
        self.encoder = Radio.from_checkpoint(enc_dir).compute_in(getattr(torch, enc_dtype)).to(self.state.device)
        size = {"tokens": math.prod(self.grid), "width": int(self.encoder.width)}
        self.shape = (2, *size.values())
        self.antialias = config.model.enc_antialias
        made = {"encoder_sha256": cached_sha256(enc_dir), "image_size": d.image_size, "antialias": self.antialias}
        half = None if enc_dtype == "float32" else enc_dtype  # records from before there was a choice say nothing
        self.record = {**made, **size, "dtype": dtype, "encoder_dtype": half}

    def claim(self, write: bool) -> None:
        """See `FolderEncoder`; features.json says what the features depend on."""
        claim(self.target_dir / RECORD, self.record, self.what, files="*/*.safetensors", write=write)

    def find_corruption(self, path: Path) -> str | None:
        """See `FolderEncoder`."""
        return find_corruption(path, self.shape)

    def encode(self, indices: Sequence[int], pairs: Tensor) -> Tensor:
        """Features (2B, N, D) in the dtype of the files."""
        return self.encoder.tokens(pairs.to(self.state.device), self.grid, self.antialias).to(getattr(torch, self.dtype))

    def write(self, source: Source, result: Tensor) -> None:
        """Store features (2, N, D)."""
        write_features(source.target, result)


def cache_features(
    config: Config, features_dir: str | Path, dtype: str, batch_size: int, num_workers: int, dry_run: bool
) -> None:
    """Write all features that are missing or damaged, and say what was done; see `FeatureEncoder`.

    Args:
        dry_run: check everything, say what is to do, write nothing.

    Raises:
        ValueError, FileNotFoundError: for what the user can mend, such as features of another encoder in features_dir.
    """
    encoder = FeatureEncoder(config, features_dir, dtype, batch_size, num_workers)
    outcome = encoder.run(dry_run)
    if outcome is None or not encoder.state.is_main_process:
        return
    (count, bad), total = outcome, len(encoder.sources)
    print(f"{count - len(bad)} files written now, {total - len(bad)} of {total} are there")
    for entry in bad:
        print(f"no features for {entry['file']}: {entry['cause']}")


def token_grid(config: Config) -> tuple[int, int]:
    """Tokens (h, w) of the network for the square images of a training configuration.

    Raises:
        ValueError: when the latents do not divide into patches.
    """
    d, patch = config.data.dataset, traits_of(config.model.network).patch_size
    if config.data.data_type == "latent":
        samples = build_c2i_dataset(config.data)
        height, width = first_readable(samples, range(min(PROBED, len(samples))))["latent"].shape[1:]
    else:
        assert d.image_size is not None, "cache_features has checked it"
        height = width = d.image_size // Autoencoder.factor_of(config.model.vae_dir)
    if height % patch or width % patch:
        raise ValueError(f"latents of {height}x{width} do not divide by model.network.params.patch_size={patch}")
    return height // patch, width // patch
