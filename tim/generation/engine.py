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
from tqdm import tqdm

import tim
from tim.files import sha256, write_json
from tim.generation.prompt_sets import Prompts, PromptSet
from tim.generation.prompt_sets import PromptSet as Job
from tim.generation.sampler import Sampler
from tim.generation.settings import SampleSettings
from tim.images import labelled_grid, make_grid, read_png, save_png, shrink

OVERVIEW_IMAGES, OVERVIEW_SIDE = 64, 256
GRID_ROWS, GRID_IMAGES = 16, 4  # prompts, and images of each prompt and number of steps, in a labelled grid


def run_sampling(sampler: Sampler, job: Job, folder: Path, weights: Path, extra: dict[str, Any], state: PartialState) -> None:
    """Draw all pictures of `job` into `folder`, continuing what is there, and write run.json beside them.

    A batch always holds the same groups of images, whichever process draws it, so that files do not depend on the number
    of processes or on interruptions.

    Args:
        job: how many groups of images there are, and how a group is written.
        extra: settings of the command that change the images and are not in SampleSettings.
        state: the processes that share the work.

    Raises:
        ValueError: when the folder belongs to a run with other settings.
    """
    s = sampler.settings
    record = _claim(folder, weights, s, extra) if state.is_main_process else None
    state.wait_for_everyone()
    if not (folder / "run.json").is_file():
        raise ValueError(f"{folder} could not be claimed by process 0")
    size = max(1, s.per_proc_batch_size // job.per_group)
    starts = range(state.process_index * size, job.groups, size * state.num_processes)
    total = sum(min(size, job.groups - b) for b in starts) * job.per_group
    bar = tqdm(total=total, unit="img", disable=not state.is_main_process, dynamic_ncols=True)
    began, drawn = time.perf_counter(), 0
    for start in starts:
        groups = range(start, min(start + size, job.groups))
        missing = [g for g in groups if not job.done(folder, g)]
        if missing:
            drawn += _draw_groups(sampler, job, folder, groups, missing)
        bar.update(len(groups) * job.per_group)
    bar.close()
    counts = accelerate.utils.gather(torch.tensor([drawn], device=state.device)).sum().item()
    if record is not None:
        seconds = time.perf_counter() - began
        speed = {"images_drawn": counts, "seconds": round(seconds, 2), "images_per_second": round(counts / seconds, 3)}
        _finish(folder, record, speed if counts else None, sampler.nfe, state.num_processes)
        save_overview(folder, job)
        print(f"{job.groups * job.per_group} images in {folder}")
        print(f"{counts} drawn now, NFE {sampler.nfe} per image, {speed['images_per_second']} images/s")
    state.wait_for_everyone()


def _draw_groups(sampler: Sampler, prompt_set: PromptSet, folder: Path, groups: range, missing: list[int]) -> int:
    """Draw all images of the groups, in calls of at most per_proc_batch_size, and write the missing ones."""
    s, n = sampler.settings, prompt_set.per_group
    keys = [(prompt_set.prompt(g), g, j) for g in groups for j in range(n)]
    size = s.per_proc_batch_size
    parts = [sampler.draw(*zip(*keys[k : k + size], strict=True)) for k in range(0, len(keys), size)]
    images, latents = np.concatenate([p[0] for p in parts]), torch.cat([p[1] for p in parts])
    for k, g in enumerate(groups):
        if g not in missing:
            continue
        own = slice(k * n, (k + 1) * n)
        if s.save_latent:
            for j, latent in enumerate(latents[own]):
                name = f"{g:06d}" if n == 1 else f"{g:06d}-{j:02d}"
                save_file({"latent": latent.cpu().contiguous()}, folder / "latents" / f"{name}.safetensors")
        prompt_set.write(folder, g, images[own])
    return len(keys)


def _claim(folder: Path, weights: Path, settings: SampleSettings, extra: dict[str, Any]) -> dict[str, Any]:
    """Create the folder, or make sure that it holds the same run; returns the content of run.json."""
    neutral = {"num_fid_samples", "per_proc_batch_size", "slice_vae", "save_latent", "compile_vae"}
    identity = {k: v for k, v in asdict(settings).items() if k not in neutral} | extra | {"weights_sha256": sha256(weights)}
    path = folder / "run.json"
    if path.is_file():
        try:
            before = json.loads(path.read_text())["settings"]
        except (json.JSONDecodeError, KeyError) as error:
            raise ValueError(f"{path} is not the record of a sampling run; move the folder away") from error
        changed = [k for k in identity if before.get(k) != identity[k]]
        if changed:
            k = changed[0]
            raise ValueError(
                f"{folder} holds images of another run ({k}: {before.get(k)!r} there, {identity[k]!r} now); "
                "choose another --sample-dir"
            )
    (folder / "latents" if settings.save_latent else folder).mkdir(parents=True, exist_ok=True)
    full = {**identity, **{k: getattr(settings, k) for k in sorted(neutral)}}
    record = {"settings": full, "weights": str(weights), "complete": False}
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
