"""REPA features of a class folder of images, once, on any number of processes.

Images are encoded in blocks of `batch_size` that do not depend on what is already there, so files do not depend on the
number of processes or on interruptions. To continue, run the same command again.
"""

import json
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from tim import rng
from tim.config import Config
from tim.data.c2i import build_c2i_dataset, load_square
from tim.data.features import RECORD, compare_records, damage, read_record, write_features
from tim.data.images import UNREADABLE
from tim.data.preprocess import Source, list_sources
from tim.distributed import set_tf32, use_cpu
from tim.models.autoencoders import Autoencoder
from tim.models.loading import sha256
from tim.models.radio import Radio

DTYPES = ("float16", "bfloat16", "float32")
PATIENCE = timedelta(days=1)  # how long a process waits for slower ones


class Squares(Dataset):
    """Centre-cropped images (3, size, size) in [-1, 1]; an item is (index, pixels or None, cause of failure)."""

    def __init__(self, sources: Sequence[Source], size: int) -> None:
        self.sources, self.size = sources, size

    def __getitem__(self, index: int) -> tuple[int, Tensor | None, str]:
        try:
            return index, load_square(self.sources[index].image, self.size, flip=False), ""
        except UNREADABLE as error:
            return index, None, str(error)


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
    record = {
        "encoder_sha256": sha256(Path(config.model.enc_dir)),
        "image_size": d.image_size,
        "tokens": grid[0] * grid[1],
        "width": encoder.width,
        "dtype": dtype,
    }
    sources = list_sources(d.image_dir, root)
    _claim(root, record, write=state.is_main_process and not dry_run)
    if state.is_main_process and not dry_run:
        for name in {source.latent.parent for source in sources}:
            name.mkdir(exist_ok=True)
    state.wait_for_everyone()
    blocks = _open_blocks(sources, batch_size, (2, record["tokens"], record["width"]), state)
    count = sum(gather_object([sum(len(wanted) for _, wanted in blocks)]))
    if state.is_main_process:
        print(f"{len(sources)} images in {d.image_dir}, {count} to encode into {root}", flush=True)
    if dry_run:
        return
    loader = DataLoader(
        Squares(sources, d.image_size), batch_sampler=[b for b, _ in blocks], collate_fn=list, num_workers=num_workers
    )
    bad = gather_object(_encode(loader, [wanted for _, wanted in blocks], sources, encoder, grid, getattr(torch, dtype), state))
    if state.is_main_process:
        print(f"{count - len(bad)} files written now, {len(sources) - len(bad)} of {len(sources)} are there")
        for line in bad:
            print(line)


def token_grid(config: Config) -> tuple[int, int]:
    """Tokens (h, w) of the network for the square images of a training configuration.

    Raises:
        ValueError: when the latents do not divide into patches.
    """
    d, patch = config.data.dataset, config.model.network.params.get("patch_size", 2)
    if config.data.data_type == "latent":
        sides = build_c2i_dataset(config.data).load(0, rng.generator(0, "data"))["latent"].shape[1:]
    else:
        sides = [d.image_size // Autoencoder.factor_of(config.model.vae_dir)] * 2
    if sides[0] % patch or sides[1] % patch:
        raise ValueError(f"latents of {sides[0]}x{sides[1]} do not divide by model.network.params.patch_size={patch}")
    return sides[0] // patch, sides[1] // patch


def _claim(root: Path, record: dict[str, Any], write: bool) -> None:
    """Make sure that the folder is new or holds features of the same kind; `write` leaves the record there."""
    if (root / RECORD).is_file():
        compare_records(root, read_record(root), record)
    elif next(root.glob("*/*.safetensors"), None) is not None:
        raise ValueError(f"{root} holds files of an unknown kind (no {RECORD}); use another folder")
    elif write:
        root.mkdir(parents=True, exist_ok=True)
        partial = root / f".{RECORD}.part"
        partial.write_text(json.dumps(record, indent=1) + "\n")
        partial.replace(root / RECORD)


def _open_blocks(
    sources: Sequence[Source], batch_size: int, shape: Sequence[int], state: PartialState
) -> list[tuple[range, set[int]]]:
    """This process's share of the blocks with something to do: all images of the block, and those without a whole file."""
    starts = range(state.process_index * batch_size, len(sources), batch_size * state.num_processes)
    blocks = []
    for start in tqdm(starts, desc="looking", unit=" blocks", disable=not state.is_main_process, dynamic_ncols=True):
        block = range(start, min(start + batch_size, len(sources)))
        blocks.append((block, {i for i in block if damage(sources[i].latent, shape) is not None}))
    return [entry for entry in blocks if entry[1]]


def _encode(
    loader: DataLoader,
    wanted: list[set[int]],
    sources: Sequence[Source],
    encoder: Radio,
    grid: Sequence[int],
    dtype: torch.dtype,
    state: PartialState,
) -> list[str]:
    """Encode whole blocks and write what is wanted of them; returns a line for each image that cannot be read."""
    bad = []
    share = f"encoding, process 1 of {state.num_processes}" if state.num_processes > 1 else "encoding"
    bar = tqdm(total=sum(map(len, wanted)), desc=share, unit="img", disable=not state.is_main_process, dynamic_ncols=True)
    for items, members in zip(loader, wanted, strict=True):
        unreadable = {index: cause for index, pixels, cause in items if pixels is None}
        for cause in (unreadable[i] for i in sorted(members & unreadable.keys())):
            bad.append(f"no features: {cause}")
            tqdm.write(bad[-1], file=sys.stderr)
        size = loader.dataset.size
        images = torch.stack([torch.zeros(3, size, size) if pixels is None else pixels for _, pixels, _ in items])
        pairs = torch.stack([images, images.flip(-1)], dim=1).flatten(0, 1).to(state.device)
        features = encoder.tokens(pairs, grid).to(dtype).cpu().unflatten(0, (-1, 2))
        for index, both in zip((index for index, _, _ in items), features, strict=True):
            if index not in members or index in unreadable:
                continue
            if not torch.isfinite(both).all():
                raise ValueError(f"features of {sources[index].image} do not fit {dtype}; use --dtype bfloat16 or float32")
            write_features(sources[index].latent, both)
        bar.update(len(members))
    bar.close()
    return bad
