"""REPA features of a class folder of images, once, on any number of processes.

Files depend neither on the number of processes nor on interruptions; see `tim.preparation.encoding`.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor

from tim import rng
from tim.config import Config
from tim.data.c2i import load_square
from tim.data.features import RECORD, find_corruption, write_features
from tim.data.registry import build_c2i_dataset
from tim.distributed import set_tf32, use_cpu
from tim.files import claim, sha256
from tim.models.autoencoders import Autoencoder
from tim.models.network import traits_of
from tim.models.radio import Radio
from tim.preparation.encoding import PATIENCE, encode_missing, list_sources
from tim.resumable import first_process, locked, own_blocks, total_over_processes

DTYPES = ("float16", "bfloat16", "float32")


def cache_features(
    config: Config, features_dir: str | Path, dtype: str, batch_size: int, num_workers: int, dry_run: bool = False
) -> None:
    """Write the features of every image of data.dataset.image_dir and of its mirror that are missing or damaged.

    Args:
        config: a training configuration; it names the images and the encoder, and its network and latents say how many
            tokens an image has.
        dtype: of the files: float16, bfloat16 or float32.
        batch_size: images per process encoded together, each with its mirror.
        dry_run: check everything, say what is to do, write nothing.

    Raises:
        ValueError, FileNotFoundError: for what the user can mend, such as features of another encoder in features_dir.
    """
    d, root = config.data.dataset, Path(features_dir)
    if config.model.enc_dir is None or d.image_dir is None or d.image_size is None:
        raise ValueError("caching features needs model.enc_dir, data.dataset.image_dir and data.dataset.image_size")
    if dtype not in DTYPES:
        raise ValueError(f"--dtype {dtype} is not one of {', '.join(DTYPES)}")
    state = PartialState(cpu=use_cpu(), timeout=PATIENCE)
    set_tf32(config.training.allow_tf32)
    encoder = Radio.from_checkpoint(config.model.enc_dir).to(state.device)
    grid = token_grid(config)
    tokens, width = grid[0] * grid[1], int(encoder.width)
    record = {
        "encoder_sha256": sha256(Path(config.model.enc_dir)),
        "image_size": d.image_size,
        "tokens": tokens,
        "width": width,
        "dtype": dtype,
    }
    sources = list_sources(d.image_dir, root)
    claim_for_run = partial(claim, root / RECORD, record, "features", files="*/*.safetensors")
    first_process(state, partial(claim_for_run, write=False))
    shape = (2, tokens, width)
    blocks = own_blocks(len(sources), batch_size, lambda k: find_corruption(sources[k].target, shape) is None, state, "looking")
    count = total_over_processes(sum(len(block.missing) for block in blocks))
    if state.is_main_process:
        print(f"{len(sources)} images in {d.image_dir}, {count} to encode into {root}", flush=True)
    if dry_run:
        return

    def encode(indices: Sequence[int], images: Tensor) -> Tensor:
        pairs = torch.stack([images, images.flip(-1)], dim=1).flatten(0, 1).to(state.device)
        return encoder.tokens(pairs, grid).to(getattr(torch, dtype)).cpu().unflatten(0, (-1, 2))

    def write(index: int, both: Tensor) -> None:
        if not torch.isfinite(both).all():
            raise ValueError(f"features of {sources[index].image} do not fit {dtype}; use --dtype bfloat16 or float32")
        write_features(sources[index].target, both)

    load = partial(load_square, size=d.image_size, flip=False)
    with locked(root, state):
        first_process(state, claim_for_run)
        if state.is_main_process:
            for name in {source.target.parent for source in sources}:
                name.mkdir(exist_ok=True)
        state.wait_for_everyone()
        mine = encode_missing("features", sources, blocks, load, encode, write, batch_size, num_workers, state)
    bad = gather_object(mine)
    if state.is_main_process:
        print(f"{count - len(bad)} files written now, {len(sources) - len(bad)} of {len(sources)} are there")
        for entry in bad:
            print(f"no features for {entry['file']}: {entry['cause']}")


def token_grid(config: Config) -> tuple[int, int]:
    """Tokens (h, w) of the network for the square images of a training configuration.

    Raises:
        ValueError: when the latents do not divide into patches.
    """
    d, patch = config.data.dataset, traits_of(config.model.network).patch_size
    if config.data.data_type == "latent":
        sides = build_c2i_dataset(config.data).load(0, rng.generator(0, "data"))["latent"].shape[1:]
    else:
        assert d.image_size is not None, "cache_features has checked it"
        sides = [d.image_size // Autoencoder.factor_of(config.model.vae_dir)] * 2
    if sides[0] % patch or sides[1] % patch:
        raise ValueError(f"latents of {sides[0]}x{sides[1]} do not divide by model.network.params.patch_size={patch}")
    return sides[0] // patch, sides[1] // patch
