"""Sampling runs: the images of a prompt set in a folder, on any number of processes, continued after interruptions."""

import glob
import logging
import os
import platform
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

import tim
from tim.checkpoint.weights import Weights
from tim.files import claim, read_json, replacing, run_record, write_json
from tim.generation.prompt_sets import PromptSet
from tim.generation.sampler import Drawn, Sampler
from tim.generation.settings import SampleSettings
from tim.images import labelled_grid, make_grid, read_png, save_png, shrink
from tim.listing import check_plain
from tim.resumable import Block, first_process, locked, own_blocks, progress_bar, total_over_processes, write_behind

# Do not change an image: dtype stands for what identity holds as network.dtype.
NEUTRAL = (
    "channels_last_vae", "compile", "compile_vae", "dtype", "num_fid_samples", "per_proc_batch_size", "png_level",
    "save_latent", "slice_vae",
)  # fmt: skip
REMEDY = "choose another --sample-dir or --name"
BESIDE = (".run.json", ".png", ".npz")  # what a run writes beside its folder, whose files are all images
OVERVIEW_IMAGES, OVERVIEW_SIDE = 64, 256
MAX_WRITERS = 16  # threads of a process that write files; more only wait for the disk
GRID_ROWS, GRID_IMAGES = 16, 4  # prompts, and images of each prompt and number of steps, in a labelled grid

logger = logging.getLogger(__name__)


def run_sampling(sampler: Sampler, prompt_set: PromptSet, folder: Path, weights: Weights, state: PartialState) -> list[str]:
    """Draw all images of `prompt_set` into `folder`, continuing what is there, and write the run's record beside it.

    A batch always holds the same groups of images, whichever process draws it, so that files do not depend on the number
    of processes or on interruptions. Images that are not finite are not written.

    Args:
        prompt_set: how many groups of images there are, and how a group is written.
        state: the processes that share the work.

    Returns:
        names of the images that are not finite.

    Raises:
        ValueError: when the folder belongs to a run with other settings, or another run is at work there.
    """
    path = run_record(folder)
    with locked(folder, state, folder.parent / f".{folder.name}.lock"):
        record = first_process(state, lambda: _claim(folder, sampler, prompt_set, weights))
        was_complete = record["complete"]
        blocks, missing = _find_missing(sampler, prompt_set, folder, state)
        if missing:
            first_process(state, lambda: write_json(path, record | {"complete": False}))
        drawn, seconds, broken = _draw_missing(sampler, prompt_set, folder, blocks, state)
        if state.is_main_process:
            asked_for_all = record["settings"]["num_fid_samples"] == sampler.settings.num_fid_samples
            record |= {
                "complete": (asked_for_all or was_complete) and not broken,
                "not_finite": len(broken),
                "nfe": sampler.nfe,
                "processes": state.num_processes,
                "versions": {"tim": tim.__version__, "python": platform.python_version()}
                | {"torch": torch.__version__, "accelerate": version("accelerate"), "diffusers": version("diffusers")},
            }
            speed = {"images_drawn": drawn, "seconds": round(seconds, 2), "images_per_second": round(drawn / seconds, 3)}
            if drawn:
                record["speed"] = speed
            write_json(path, record)
            save_overview(folder, prompt_set)
            count = prompt_set.groups * prompt_set.per_group - len(broken)
            print(f"{count} images in {folder}, their record in {path}, the first in {folder}.png")
            print(f"{drawn} drawn now, NFE {sampler.nfe} per image, {speed['images_per_second']} images/s")
    state.wait_for_everyone()
    return broken


def latent_files(prompt_set: PromptSet, folder: Path, group: int) -> list[Path]:
    """The latents of a group's images, in a folder beside theirs."""
    n = prompt_set.per_group
    names = [f"{group:06d}" if n == 1 else f"{group:06d}-{j:02d}" for j in range(n)]
    return [folder.parent / f"{folder.name}.latents" / f"{name}.safetensors" for name in names]


def _find_missing(sampler: Sampler, prompt_set: PromptSet, folder: Path, state: PartialState) -> tuple[list[Block], int]:
    """This process's blocks with missing or damaged files, and images of all processes to draw; says what comes. Collective."""
    s, n = sampler.settings, prompt_set.per_group

    def done(group: int) -> bool:
        latents = latent_files(prompt_set, folder, group) if s.save_latent else []
        return prompt_set.is_done(folder, group) and all(map(_is_whole_latent, latents))

    size = max(1, s.per_proc_batch_size // n)
    desc = "looking for finished images" if any(folder.iterdir()) else None
    blocks = own_blocks(prompt_set.groups, size, done, state, desc)
    missing = total_over_processes(n * sum(len(block.missing) for block in blocks))
    if state.is_main_process:
        steps = f"{s.num_steps} step{'s' * (s.num_steps > 1)} (NFE {sampler.nfe}) each"
        where = f"{s.per_proc_batch_size} at once on {state.num_processes} x {sampler.device.type}, into {folder}"
        logger.info("drawing %d of %d images %dx%d, %s, %s", missing, prompt_set.groups * n, *s.size, steps, where)
    return blocks, missing


def _is_whole_latent(path: Path) -> bool:
    """Whether a file of latents is there to its end; safetensors compares its length with its header."""
    try:
        check_plain(path)
        with safe_open(path, "pt") as file:
            return list(file.keys()) == ["latent"]
    except (OSError, SafetensorError):
        return False


def _draw_missing(
    sampler: Sampler, prompt_set: PromptSet, folder: Path, blocks: list[Block], state: PartialState
) -> tuple[int, float, list[str]]:
    """Draw and write what is not there; images drawn by all processes, seconds, and names of those that are not finite."""
    began, drawn = time.perf_counter(), 0
    broken: list[str] = []
    threads = max(1, min(MAX_WRITERS, (os.cpu_count() or 1) // state.num_processes))
    batches = (_launch(sampler, prompt_set, folder, block) for block in blocks)
    with (
        progress_bar(blocks, state, None, each=prompt_set.per_group) as bar,
        closing(write_behind(batches, threads)) as written,
    ):
        for block, names in zip(blocks, written, strict=True):
            broken += chain.from_iterable(names)
            drawn += len(block.items) * prompt_set.per_group
            bar.update(len(block.missing) * prompt_set.per_group)
    return total_over_processes(drawn), time.perf_counter() - began, sorted(gather_object(broken))


def _launch(sampler: Sampler, prompt_set: PromptSet, folder: Path, block: Block) -> list[Callable[[], list[str]]]:
    """Draw all images of a block, in calls of at most per_proc_batch_size.

    Returns:
        for each group with missing files a function that waits for its images, writes what is missing, and returns the
        names of those that are not finite.
    """
    n, size = prompt_set.per_group, sampler.settings.per_proc_batch_size
    keys = [(prompt_set.prompts[g], g, j) for g in block.items for j in range(n)]
    parts = [sampler.launch(*zip(*keys[k : k + size], strict=True)) for k in range(0, len(keys), size)]
    rows = [(parts[k // size], k % size) for k in range(len(keys))]
    starts = {g: (g - block.items.start) * n for g in block.missing}
    return [partial(_write, sampler.settings, prompt_set, folder, g, rows[k : k + n]) for g, k in starts.items()]


def _write(s: SampleSettings, prompt_set: PromptSet, folder: Path, group: int, rows: Sequence[tuple[Drawn, int]]) -> list[str]:
    """Write what is missing of a group; returns the names of its images that are not finite.

    Args:
        rows: batch of each image, and its row there.
    """
    finite = [bool(drawn.wait().finite[k]) for drawn, k in rows]
    if not prompt_set.is_done(folder, group):
        images = [drawn.images[k].numpy() if good else None for (drawn, k), good in zip(rows, finite, strict=True)]
        prompt_set.write(folder, group, images, s.png_level)
    latents = latent_files(prompt_set, folder, group) if s.save_latent else []
    for path, (drawn, k), good in zip(latents, rows, finite, strict=False):
        if good and not _is_whole_latent(path):
            with replacing(path) as unfinished:
                save_file({"latent": drawn.latents[k].contiguous()}, unfinished)
    return [prompt_set.image_name(group, j) for j, good in enumerate(finite) if not good]


def _claim(folder: Path, sampler: Sampler, prompt_set: PromptSet, weights: Weights) -> dict[str, Any]:
    """Make sure that a folder holds the same run, or none, and write the record beside it; returns the record."""
    settings = asdict(sampler.settings)
    neutral = {key: settings.pop(key) for key in NEUTRAL}
    known = settings | prompt_set.identity | sampler.conditions.identity | {"weights_sha256": weights.digest()}
    if known.get("text_padding") == "batch":  # an image depends on its batch
        known["per_proc_batch_size"] = neutral.pop("per_proc_batch_size")
    identity = known | sampler.identity | {"autoencoder": sampler.vae and sampler.vae.identity}
    path, inside = run_record(folder), folder / "run.json"  # where it was once
    if inside.is_file() and not path.is_file():  # what an old record does not know of is taken to be as it is now
        before = _read_record(inside)
        claim(inside, {k: v for k, v in identity.items() if k in before["settings"]}, "images", REMEDY, "settings", write=False)
    else:
        before = _read_record(path)
        claim(path, identity, "images", REMEDY, "settings", files="[!.]*", write=False, folder=folder)
    there, asked = before["settings"].get("num_fid_samples", 0), neutral["num_fid_samples"]
    if asked < there:
        state = "all" if before.get("complete") else "not all"
        logger.info("%s is of %d images, %s of them there; this run looks after the first %d", folder, there, state, asked)
    settings = identity | neutral | {"num_fid_samples": max(asked, there)}
    is_complete = bool(before.get("complete")) and asked <= there
    record = before | {"settings": settings, "weights": str(weights.source), "complete": is_complete}
    write_json(path, record)
    _tidy(folder, sampler.settings.save_latent)
    return record


def _read_record(path: Path) -> dict[str, Any]:
    """A run's record; one without settings when there is none, or it is damaged."""
    try:
        record = read_json(path)
        count = record["settings"].get("num_fid_samples", 0)
        return record if type(count) is int and count >= 0 else {"settings": {}}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {"settings": {}}


def _tidy(folder: Path, save_latent: bool) -> None:
    """Clear away what killed and older runs have left in and beside a folder whose record is written; make that of latents."""
    latents = folder.parent / f"{folder.name}.latents"
    if (folder / "latents").is_dir() and not latents.exists():  # where they, the record and the lock were once
        (folder / "latents").rename(latents)
    for name in ("run.json", ".lock"):
        (folder / name).unlink(missing_ok=True)
    if save_latent:
        latents.mkdir(exist_ok=True)
    own = (glob.escape(f".{(folder.name + suffix)[:200]}.") for suffix in BESIDE)
    partials = chain(*(folder.parent.glob(f"{name}????????.part") for name in own), latents.glob(".*.????????.part"))
    for path in partials:
        path.unlink(missing_ok=True)


def save_overview(folder: Path, prompt_set: PromptSet) -> None:
    """The first images as a grid in `<folder>.png`, large ones scaled down."""
    paths = [prompt_set.files(folder, g)[0] for g in range(min(OVERVIEW_IMAGES, prompt_set.groups))]
    paths = [path for path in paths if path.is_file()]  # not those that are not finite
    if not paths:
        return
    images = [np.asarray(shrink(Image.fromarray(read_png(path)), OVERVIEW_SIDE)) for path in paths]
    columns = 10 if len(images) > 10 else len(images)
    grid = make_grid(np.stack(images), columns, scale=max(1, 64 // images[0].shape[1]))
    save_png(folder.with_name(f"{folder.name}.png"), grid)


def save_prompt_grids(prompt_set: PromptSet, folders: Sequence[Path], steps: list[int], name: str | None = None) -> None:
    """prompts.json in every folder, and one labelled grid a size beside them: prompts down, numbers of steps across.

    Args:
        folders: of the runs, for each size one of every number of steps.
        name: goes in front of the grids' names.
    """
    prompts = [str(prompt) for prompt in prompt_set.prompts]
    for folder in folders:
        write_json(folder / "prompts.json", prompts)
    shown = range(min(prompt_set.groups, GRID_ROWS))
    repeats = min(prompt_set.per_group, GRID_IMAGES)
    labels = [f"{n} step{'s' * (n > 1)}" if j == 0 else "" for n in steps for j in range(repeats)]
    for start in range(0, len(folders), len(steps)):
        own = folders[start : start + len(steps)]
        rows = [[read_png(path) for folder in own for path in prompt_set.files(folder, g)[:repeats]] for g in shown]
        height, width = rows[0][0].shape[:2]
        path = own[0].parent / f"{f'{name}-' if name else ''}grid-{height}x{width}.png"
        save_png(path, labelled_grid(rows, prompts[: len(rows)], labels, min(256, max(96, height, width))))
        print(f"grid in {path}")
