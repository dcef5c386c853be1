"""Images to latents, once: class folders of images become `latent_dir/<class>/<name>.safetensors`.

The noise of the KL posterior is a function of (seed, place of the image in the sorted list), so files depend neither on the
number of processes nor on interruptions; see `tim.preparation.encoding`.
"""

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor
from tqdm import tqdm

from tim import rng
from tim.config import to_yaml
from tim.data.latents import Moments, find_corruption, read_latent, write_latent
from tim.distributed import set_tf32, use_cpu
from tim.files import claim, write_json, write_json_lines, write_text
from tim.models.autoencoders import Autoencoder
from tim.preparation.encoding import PATIENCE, Source, encode_missing, list_sources
from tim.preparation.settings import Native, Settings, Square
from tim.resumable import first_process, locked, own_blocks, total_over_processes

RECORD = "preprocess.json"  # in latent_dir: what its files depend on


def preprocess(settings: Square | Native, project_dir: str | Path, dry_run: bool = False) -> None:
    """Make all latents of a class folder that are missing or damaged, on any number of processes.

    Writes the latents and preprocess.json under latent_dir; config.yaml, bad_images.jsonl (images without a latent and why)
    and statistics.json (mean and deviation per channel, in latent units) under project_dir.

    Args:
        dry_run: check everything, print what is there and what is to do, write nothing.

    Raises:
        ValueError, FileNotFoundError: for what the user can mend, such as latents of other settings in latent_dir.
    """
    state, project_dir = PartialState(cpu=use_cpu(), timeout=PATIENCE), Path(project_dir)
    set_tf32(settings.allow_tf32)
    vae = Autoencoder.from_pretrained(settings.vae_dir, getattr(torch, settings.vae_dtype), state.device)
    settings.check(vae)
    latent_dir = Path(settings.latent_dir or project_dir / "latents")
    sources = list_sources(settings.image_dir, latent_dir)
    classes = list(dict.fromkeys(source.target.parent.name for source in sources))
    identity, record = settings.identity(vae, classes), latent_dir / RECORD
    claim_for_run = partial(claim, record, identity, "latents", "choose another latent_dir", files="*/*.safetensors")
    first_process(state, partial(claim_for_run, write=False))
    blocks = own_blocks(
        len(sources), settings.batch_size, lambda k: find_corruption(sources[k].target) is None, state, "looking"
    )
    count = total_over_processes(sum(len(block.missing) for block in blocks))
    if state.is_main_process:
        print(f"{len(sources)} images in {settings.image_dir}, {count} to encode into {latent_dir}", flush=True)
    if dry_run:
        return
    with locked(latent_dir, state):
        first_process(state, claim_for_run)
        if state.is_main_process:
            write_text(project_dir / "config.yaml", to_yaml(settings))
            for name in classes:
                (latent_dir / name).mkdir(exist_ok=True)
        state.wait_for_everyone()
        dtype, block_size = getattr(torch, settings.latent_dtype), settings.batch_size if settings.one_size else None
        bad = encode_missing(
            "latent",
            sources,
            blocks,
            settings.load,
            lambda indices, images: encode(vae, images, settings.seed, indices).to("cpu", dtype),
            lambda index, latent: write_latent(sources[index].target, latent, sources[index].label),
            block_size,
            settings.num_workers,
            state,
        )
        bad = gather_object(bad)
        statistics = _statistics(settings, sources, state)
        if state.is_main_process:
            _report(project_dir, len(sources), count, sorted(bad, key=lambda entry: entry["index"]), statistics)


def encode(vae: Autoencoder, images: Tensor, seed: int, indices: Sequence[int]) -> Tensor:
    """Latents of images and their mirrors.

    Args:
        images: (B, 3, H, W) in [-1, 1].
        indices: of the images in the list of all; they choose the KL posterior's noise.

    Returns:
        (B, 2, C, h, w) float32.
    """
    pairs = torch.stack([images, images.flip(-1)], dim=1).flatten(0, 1)
    noise = None
    if vae.is_kl:
        noise = rng.normals(seed, "posterior", 0, indices, (2, *vae.latent_shape(*images.shape[2:]))).flatten(0, 1)
    return vae.encode(pairs, noise).unflatten(0, (-1, 2))


def _statistics(settings: Settings, sources: Sequence[Source], state: PartialState) -> dict[str, Any]:
    """Mean and deviation per channel over evenly spread latents, the same ones for any number of processes."""
    state.wait_for_everyone()
    stride = math.ceil(len(sources) / settings.statistics_files)
    chosen = sources[::stride][state.process_index :: state.num_processes]
    mine, files = Moments(), 0
    for source in tqdm(chosen, desc="statistics", unit="img", disable=not state.is_main_process, dynamic_ncols=True):
        if source.target.is_file():  # unreadable images have none
            mine.add(read_latent(source.target)[0])
            files += 1
    merged = Moments()
    for other in gather_object([mine]):
        merged.merge(other)
    mean, std = merged.mean_std()
    return {"files": total_over_processes(files), "mean": mean, "std": std}


def _report(project_dir: Path, total: int, encoded: int, bad: list[dict[str, Any]], statistics: dict[str, Any]) -> None:
    """Write bad_images.jsonl and statistics.json, and say what was done. ValueError when no image could be read."""
    path = project_dir / "bad_images.jsonl"
    write_json_lines(path, bad)
    if len(bad) == total:
        raise ValueError(f"none of the {total} images could be read; see {path}")
    write_json(project_dir / "statistics.json", {"images": total - len(bad), **statistics})
    print(f"{encoded - len(bad)} latents made now, {total - len(bad)} of {total} are there; statistics in {project_dir}")
    if bad:
        print(f"{len(bad)} of {total} images could not be read and have no latent; they are named in {path}")
