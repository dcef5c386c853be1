"""Images to latents, once: class folders of images become `latent_dir/<class>/<name>.safetensors`.

The noise of the KL posterior is a function of (seed, place of the image in the sorted list), and images are encoded in
blocks of `batch_size` that do not depend on what is already there, so files do not depend on the number of processes or on
interruptions. To continue, run the same command again: only missing and damaged files are made.
"""

import json
import math
import sys
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from tim import rng
from tim.config import to_yaml
from tim.data.c2i import class_folders
from tim.data.images import UNREADABLE, list_images
from tim.data.latents import Moments, damage, read_latent, write_latent
from tim.data.preprocess_config import Native, Settings, Square
from tim.distributed import set_tf32, use_cpu
from tim.models.autoencoders import Autoencoder

RECORD = "preprocess.json"  # in latent_dir: what its files depend on
PATIENCE = timedelta(days=1)  # how long a process waits for slower ones


class Source(NamedTuple):
    """An image and the latent file it becomes."""

    image: Path
    latent: Path
    label: int


class Images(Dataset):
    """Reads images in worker processes; an item is (index, pixels or None, cause of failure)."""

    def __init__(self, sources: Sequence[Source], settings: Square | Native) -> None:
        self.sources, self.settings = sources, settings

    def __getitem__(self, index: int) -> tuple[int, Tensor | None, str]:
        try:
            return index, self.settings.load(self.sources[index].image), ""
        except UNREADABLE as error:
            return index, None, str(error)


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
    classes = list(dict.fromkeys(source.latent.parent.name for source in sources))
    _claim(latent_dir, settings.identity(vae, classes), write=state.is_main_process and not dry_run)
    if state.is_main_process and not dry_run:
        project_dir.mkdir(parents=True, exist_ok=True)
        (project_dir / "config.yaml").write_text(to_yaml(settings))
        for name in classes:
            (latent_dir / name).mkdir(exist_ok=True)
    state.wait_for_everyone()
    todo = _find_missing(sources, settings.batch_size, state)
    count = sum(gather_object([sum(map(len, todo))]))
    if state.is_main_process:
        print(f"{len(sources)} images in {settings.image_dir}, {count} to encode into {latent_dir}", flush=True)
    if dry_run:
        return
    bad = gather_object(_encode_missing(settings, sources, todo, vae, state))
    statistics = _statistics(settings, sources, state)
    if state.is_main_process:
        _report(project_dir, len(sources), count, sorted(bad, key=lambda entry: entry["index"]), statistics)


def list_sources(image_dir: str, latent_dir: Path) -> list[Source]:
    """All images in the order of class folders and names; labels count the class folders.

    Raises:
        FileNotFoundError: when image_dir is missing or holds no class folder.
        ValueError: when a class is empty, or two images would become one latent file.
    """
    sources = []
    for label, folder in enumerate(class_folders(image_dir)):
        owner: dict[str, Path] = {}
        for path in list_images(folder):
            if owner.setdefault(path.stem, path) is not path:
                raise ValueError(f"{path} and {owner[path.stem].name} would both become {path.stem}.safetensors; rename one")
            sources.append(Source(path, latent_dir / folder.name / f"{path.stem}.safetensors", label))
        if not owner:
            raise ValueError(f"class folder {folder} is empty; fill or remove it")
    return sources


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


def _claim(latent_dir: Path, identity: dict[str, Any], write: bool) -> None:
    """Make sure that latent_dir is new or holds latents of the same settings; `write` leaves the record there."""
    path = latent_dir / RECORD
    if path.is_file():
        before = json.loads(path.read_text())
        for key in {**before, **identity}:
            if before.get(key) != identity.get(key):
                raise ValueError(
                    f"{latent_dir} holds latents of other settings ({key}: {before.get(key)!r} there, "
                    f"{identity.get(key)!r} now); choose another latent_dir"
                )
    elif next(latent_dir.glob("*/*.safetensors"), None) is not None:
        raise ValueError(f"{latent_dir} holds latents of unknown settings (no {RECORD}); choose another latent_dir")
    elif write:
        latent_dir.mkdir(parents=True, exist_ok=True)
        _write(path, json.dumps(identity, indent=1) + "\n")


def _find_missing(sources: Sequence[Source], batch_size: int, state: PartialState) -> list[list[int]]:
    """This process's share of the blocks of batch_size images: in each, the images without a whole latent file."""
    starts = range(state.process_index * batch_size, len(sources), batch_size * state.num_processes)
    blocks = []
    for start in tqdm(starts, desc="looking", unit=" blocks", disable=not state.is_main_process, dynamic_ncols=True):
        block = range(start, min(start + batch_size, len(sources)))
        blocks.append([i for i in block if damage(sources[i].latent) is not None])
    return [block for block in blocks if block]


def _encode_missing(
    settings: Square | Native, sources: Sequence[Source], todo: list[list[int]], vae: Autoencoder, state: PartialState
) -> list[dict[str, Any]]:
    """Encode and write the images of `todo`; returns those that could not be read."""
    loader = DataLoader(Images(sources, settings), batch_sampler=todo, collate_fn=list, num_workers=settings.num_workers)
    bad, dtype = [], getattr(torch, settings.latent_dtype)
    share = f"encoding, process 1 of {state.num_processes}" if state.num_processes > 1 else "encoding"
    bar = tqdm(total=sum(map(len, todo)), desc=share, unit="img", disable=not state.is_main_process, dynamic_ncols=True)
    for items in loader:
        for index, _, cause in items:
            if cause:
                bad.append({"index": index, "file": str(sources[index].image), "cause": cause})
                tqdm.write(f"no latent for {sources[index].image}: {cause}", file=sys.stderr)
        for indices, images in _batches(settings, items, len(sources)):
            latents = encode(vae, images, settings.seed, indices).to("cpu", dtype)
            wanted = {index for index, pixels, _ in items if pixels is not None}
            for index, latent in zip(indices, latents, strict=True):
                if index in wanted:
                    write_latent(sources[index].latent, latent, sources[index].label)
        bar.update(len(items))
        bar.set_postfix(unreadable=len(bad), refresh=False)
    bar.close()
    return bad


def _batches(
    settings: Square | Native, items: list[tuple[int, Tensor | None, str]], total: int
) -> Iterator[tuple[Sequence[int], Tensor]]:
    """What is encoded together: (indices, images), always of the same shape for the same images.

    Images of one size come as their whole block, with zeros for those that are done or unreadable, because the rounding of
    a convolution may depend on the size of the batch but not on its other members. Images of any size come one by one.
    """
    readable = [(index, pixels) for index, pixels, _ in items if pixels is not None]
    if not settings.one_size:
        yield from (([index], pixels[None]) for index, pixels in readable)
    elif readable:
        start = readable[0][0] // settings.batch_size * settings.batch_size
        block = range(start, min(start + settings.batch_size, total))
        images = torch.zeros(len(block), *readable[0][1].shape)
        for index, pixels in readable:
            images[index - start] = pixels
        yield block, images


def _statistics(settings: Settings, sources: Sequence[Source], state: PartialState) -> dict[str, Any]:
    """Mean and deviation per channel over evenly spread latents, the same ones for any number of processes."""
    state.wait_for_everyone()
    stride = math.ceil(len(sources) / settings.statistics_files)
    chosen = sources[::stride][state.process_index :: state.num_processes]
    mine, files = Moments(), 0
    for source in tqdm(chosen, desc="statistics", unit="img", disable=not state.is_main_process, dynamic_ncols=True):
        if source.latent.is_file():  # unreadable images have none
            mine.add(read_latent(source.latent)[0])
            files += 1
    merged = Moments()
    for other in gather_object([mine]):
        merged.merge(other)
    mean, std = merged.mean_std()
    return {"files": sum(gather_object([files])), "mean": mean, "std": std}


def _report(project_dir: Path, total: int, encoded: int, bad: list[dict[str, Any]], statistics: dict[str, Any]) -> None:
    """Write bad_images.jsonl and statistics.json, and say what was done. ValueError when no image could be read."""
    path = project_dir / "bad_images.jsonl"
    _write(path, "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in bad))
    if len(bad) == total:
        raise ValueError(f"none of the {total} images could be read; see {path}")
    _write(project_dir / "statistics.json", json.dumps({"images": total - len(bad), **statistics}, indent=1) + "\n")
    print(f"{encoded - len(bad)} latents made now, {total - len(bad)} of {total} are there; statistics in {project_dir}")
    if bad:
        print(f"{len(bad)} of {total} images could not be read and have no latent; they are named in {path}")


def _write(path: Path, text: str) -> None:
    """Write a text file whole."""
    partial = path.with_name(f".{path.name}.part")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
