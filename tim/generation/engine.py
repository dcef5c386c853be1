"""Sampling runs: the images of a prompt set in a folder, on any number of processes, continued after interruptions."""

import json
import platform
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import accelerate
import diffusers
import numpy as np
import torch
from accelerate import PartialState
from PIL import Image
from safetensors.torch import save_file

import tim
from tim.checkpoint.weights import Weights
from tim.files import claim, write_json
from tim.generation.prompt_sets import Prompts, PromptSet
from tim.generation.sampler import Sampler
from tim.generation.settings import SampleSettings
from tim.images import labelled_grid, make_grid, read_png, save_png, shrink
from tim.resumable import Block, first_process, locked, own_blocks, progress_bar, total_over_processes

OVERVIEW_IMAGES, OVERVIEW_SIDE = 64, 256
GRID_ROWS, GRID_IMAGES = 16, 4  # prompts, and images of each prompt and number of steps, in a labelled grid


def run_sampling(
    sampler: Sampler, prompt_set: PromptSet, folder: Path, weights: Weights, extra: dict[str, Any], state: PartialState
) -> None:
    """Draw all images of `prompt_set` into `folder`, continuing what is there, and write run.json beside them.

    A batch always holds the same groups of images, whichever process draws it, so that files do not depend on the number
    of processes or on interruptions.

    Args:
        prompt_set: how many groups of images there are, and how a group is written.
        extra: settings of the command that change the images and are not in SampleSettings.
        state: the processes that share the work.

    Raises:
        ValueError: when the folder belongs to a run with other settings, or another run is at work there.
    """
    with locked(folder, state):
        record = first_process(state, lambda: _claim(folder, weights, sampler.settings, extra))
        drawn, seconds = _draw_missing(sampler, prompt_set, folder, state)
        if state.is_main_process:
            speed = {"images_drawn": drawn, "seconds": round(seconds, 2), "images_per_second": round(drawn / seconds, 3)}
            _finish(folder, record, speed if drawn else None, sampler.nfe, state.num_processes)
            save_overview(folder, prompt_set)
            print(f"{prompt_set.groups * prompt_set.per_group} images in {folder}")
            print(f"{drawn} drawn now, NFE {sampler.nfe} per image, {speed['images_per_second']} images/s")
    state.wait_for_everyone()


def _draw_missing(sampler: Sampler, prompt_set: PromptSet, folder: Path, state: PartialState) -> tuple[int, float]:
    """Draw and write what is not there; images drawn by all processes, and seconds."""
    size = max(1, sampler.settings.per_proc_batch_size // prompt_set.per_group)
    blocks = own_blocks(prompt_set.groups, size, lambda group: prompt_set.done(folder, group), state)
    began, drawn = time.perf_counter(), 0
    with progress_bar(blocks, state, None, each=prompt_set.per_group) as bar:
        for block in blocks:
            drawn += _draw_groups(sampler, prompt_set, folder, block)
            bar.update(len(block.missing) * prompt_set.per_group)
    return total_over_processes(drawn), time.perf_counter() - began


def _draw_groups(sampler: Sampler, prompt_set: PromptSet, folder: Path, block: Block) -> int:
    """Draw all images of a block, in calls of at most per_proc_batch_size, and write the missing groups."""
    s, n = sampler.settings, prompt_set.per_group
    keys = [(prompt_set.prompt(g), g, j) for g in block.items for j in range(n)]
    size = s.per_proc_batch_size
    parts = [sampler.draw(*zip(*keys[k : k + size], strict=True)) for k in range(0, len(keys), size)]
    images, latents = np.concatenate([p[0] for p in parts]), torch.cat([p[1] for p in parts])
    for g in block.missing:
        own = slice((g - block.items.start) * n, (g - block.items.start + 1) * n)
        if s.save_latent:
            for j, latent in enumerate(latents[own]):
                name = f"{g:06d}" if n == 1 else f"{g:06d}-{j:02d}"
                save_file({"latent": latent.cpu().contiguous()}, folder / "latents" / f"{name}.safetensors")
        prompt_set.write(folder, g, images[own])
    return len(keys)


def _claim(folder: Path, weights: Weights, settings: SampleSettings, extra: dict[str, Any]) -> dict[str, Any]:
    """Create the folder, or make sure that it holds the same run; returns the content of run.json."""
    neutral = {"num_fid_samples", "per_proc_batch_size", "slice_vae", "save_latent", "compile_vae"}
    identity = {k: v for k, v in asdict(settings).items() if k not in neutral} | extra | {"weights_sha256": weights.digest()}
    path = folder / "run.json"
    claim(path, identity, "images", "choose another --sample-dir", key="settings", write=False)
    (folder / "latents" if settings.save_latent else folder).mkdir(parents=True, exist_ok=True)
    full = identity | {k: getattr(settings, k) for k in sorted(neutral)}
    record = {"settings": full, "weights": str(weights.source), "complete": False}
    if not path.is_file():
        write_json(path, record)
    return record


def _finish(folder: Path, record: dict[str, Any], speed: dict | None, nfe: int, processes: int) -> None:
    """Complete run.json; a run that drew nothing keeps the speed measured before."""
    path = folder / "run.json"
    before = json.loads(path.read_text())
    versions = {
        "tim": tim.__version__,
        "python": platform.python_version(),
        **{m.__name__: m.__version__ for m in (torch, accelerate, diffusers)},
    }
    done = {"complete": True, "nfe": nfe, "processes": processes, "speed": speed or before.get("speed"), "versions": versions}
    write_json(path, {**record, **done})


def save_overview(folder: Path, prompt_set: PromptSet) -> None:
    """The first images as a grid in `<folder>.png`, large ones scaled down."""
    paths = [prompt_set.files(folder, g)[0] for g in range(min(OVERVIEW_IMAGES, prompt_set.groups))]
    images = [np.asarray(shrink(Image.fromarray(read_png(path)), OVERVIEW_SIDE)) for path in paths]
    columns = 10 if len(images) > 10 else len(images)
    grid = make_grid(np.stack(images), columns, scale=max(1, 64 // images[0].shape[1]))
    save_png(folder.with_name(f"{folder.name}.png"), grid)


def save_prompt_grids(prompt_set: Prompts, folders: list[Path], steps: list[int]) -> None:
    """prompts.json in every folder, and one labelled grid a size beside them: prompts down, numbers of steps across.

    Args:
        folders: of the runs, for each size one of every number of steps.
    """
    for folder in folders:
        (folder / "prompts.json").write_text(json.dumps(prompt_set.prompts, ensure_ascii=False, indent=1), encoding="utf-8")
    shown = range(min(prompt_set.groups, GRID_ROWS))
    repeats = min(prompt_set.per_group, GRID_IMAGES)
    labels = [f"{n} step{'s' * (n > 1)}" if j == 0 else "" for n in steps for j in range(repeats)]
    for start in range(0, len(folders), len(steps)):
        own = folders[start : start + len(steps)]
        rows = [[read_png(path) for folder in own for path in prompt_set.files(folder, g)[:repeats]] for g in shown]
        height, width = rows[0][0].shape[:2]
        path = own[0].parent / f"grid-{height}x{width}.png"
        save_png(path, labelled_grid(rows, prompt_set.prompts[: len(rows)], labels, min(256, max(96, height, width))))
        print(f"grid in {path}")
