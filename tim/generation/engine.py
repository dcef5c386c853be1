"""Sampling runs: the images of a prompt set in a folder, on any number of processes, continued after interruptions."""

import json
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image
from safetensors.torch import save_file

import tim
from tim.checkpoint.weights import Weights
from tim.files import claim, replacing, write_json
from tim.generation.prompt_sets import PromptSet
from tim.generation.sampler import Sampler
from tim.images import labelled_grid, make_grid, read_png, save_png, shrink
from tim.resumable import Block, first_process, locked, own_blocks, progress_bar, total_over_processes

NEUTRAL = ("compile_vae", "num_fid_samples", "per_proc_batch_size", "save_latent", "slice_vae")  # do not change an image
OVERVIEW_IMAGES, OVERVIEW_SIDE = 64, 256
GRID_ROWS, GRID_IMAGES = 16, 4  # prompts, and images of each prompt and number of steps, in a labelled grid


def run_sampling(sampler: Sampler, prompt_set: PromptSet, folder: Path, weights: Weights, state: PartialState) -> None:
    """Draw all images of `prompt_set` into `folder`, continuing what is there, and write run.json beside them.

    A batch always holds the same groups of images, whichever process draws it, so that files do not depend on the number
    of processes or on interruptions.

    Args:
        prompt_set: how many groups of images there are, and how a group is written.
        state: the processes that share the work.

    Raises:
        ValueError: when the folder belongs to a run with other settings, or another run is at work there.
    """
    path = folder / "run.json"
    with locked(folder, state):
        record = first_process(state, lambda: _claim(path, sampler, prompt_set, weights))
        drawn, seconds = _draw_missing(sampler, prompt_set, folder, state)
        if state.is_main_process:
            speed = {"images_drawn": drawn, "seconds": round(seconds, 2), "images_per_second": round(drawn / seconds, 3)}
            record |= {
                "complete": True,
                "nfe": sampler.nfe,
                "processes": state.num_processes,
                "speed": speed if drawn else json.loads(path.read_bytes()).get("speed"),  # of the run that drew something
                "versions": {"tim": tim.__version__, "python": platform.python_version()}
                | {"torch": torch.__version__, "accelerate": version("accelerate"), "diffusers": version("diffusers")},
            }
            write_json(path, record)
            save_overview(folder, prompt_set)
            print(f"{prompt_set.groups * prompt_set.per_group} images and run.json in {folder}, the first in {folder}.png")
            print(f"{drawn} drawn now, NFE {sampler.nfe} per image, {speed['images_per_second']} images/s")
    state.wait_for_everyone()


def _draw_missing(sampler: Sampler, prompt_set: PromptSet, folder: Path, state: PartialState) -> tuple[int, float]:
    """Draw and write what is not there; images drawn by all processes, and seconds."""
    size = max(1, sampler.settings.per_proc_batch_size // prompt_set.per_group)

    def done(group: int) -> bool:
        return all(path.is_file() for path in prompt_set.files(folder, group))

    blocks = own_blocks(prompt_set.groups, size, done, state)
    began, drawn = time.perf_counter(), 0
    with progress_bar(blocks, state, None, each=prompt_set.per_group) as bar:
        for block in blocks:
            drawn += _draw_groups(sampler, prompt_set, folder, block)
            bar.update(len(block.missing) * prompt_set.per_group)
    return total_over_processes(drawn), time.perf_counter() - began


def _draw_groups(sampler: Sampler, prompt_set: PromptSet, folder: Path, block: Block) -> int:
    """Draw all images of a block, in calls of at most per_proc_batch_size, and write the missing groups."""
    s, n = sampler.settings, prompt_set.per_group
    keys = [(prompt_set.prompts[g], g, j) for g in block.items for j in range(n)]
    size = s.per_proc_batch_size
    parts = [sampler.draw(*zip(*keys[k : k + size], strict=True)) for k in range(0, len(keys), size)]
    images, latents = np.concatenate([p[0] for p in parts]), torch.cat([p[1] for p in parts])
    for g in block.missing:
        own = slice((g - block.items.start) * n, (g - block.items.start + 1) * n)
        if s.save_latent:
            for j, latent in enumerate(latents[own]):
                name = f"{g:06d}" if n == 1 else f"{g:06d}-{j:02d}"
                with replacing(folder / "latents" / f"{name}.safetensors") as partial:
                    save_file({"latent": latent.cpu().contiguous()}, partial)
        prompt_set.write(folder, g, images[own])
    return len(keys)


def _claim(path: Path, sampler: Sampler, prompt_set: PromptSet, weights: Weights) -> dict[str, Any]:
    """Create the folder of run.json, or make sure that it holds the same run; returns the content of run.json."""
    settings = asdict(sampler.settings)
    neutral = {key: settings.pop(key) for key in NEUTRAL}
    identity = settings | prompt_set.identity | sampler.conditions.identity | {"weights_sha256": weights.digest()}
    claim(path, identity, "images", "choose another --sample-dir", key="settings", write=False)
    (path.parent / "latents" if sampler.settings.save_latent else path.parent).mkdir(parents=True, exist_ok=True)
    record = {"settings": identity | neutral, "weights": str(weights.source), "complete": False}
    if not path.is_file():
        write_json(path, record)
    return record


def save_overview(folder: Path, prompt_set: PromptSet) -> None:
    """The first images as a grid in `<folder>.png`, large ones scaled down."""
    paths = [prompt_set.files(folder, g)[0] for g in range(min(OVERVIEW_IMAGES, prompt_set.groups))]
    images = [np.asarray(shrink(Image.fromarray(read_png(path)), OVERVIEW_SIDE)) for path in paths]
    columns = 10 if len(images) > 10 else len(images)
    grid = make_grid(np.stack(images), columns, scale=max(1, 64 // images[0].shape[1]))
    save_png(folder.with_name(f"{folder.name}.png"), grid)


def save_prompt_grids(prompt_set: PromptSet, folders: Sequence[Path], steps: list[int]) -> None:
    """prompts.json in every folder, and one labelled grid a size beside them: prompts down, numbers of steps across.

    Args:
        folders: of the runs, for each size one of every number of steps.
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
        path = own[0].parent / f"grid-{height}x{width}.png"
        save_png(path, labelled_grid(rows, prompts[: len(rows)], labels, min(256, max(96, height, width))))
        print(f"grid in {path}")
