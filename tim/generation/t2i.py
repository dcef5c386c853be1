"""What the text-to-image sampling commands share."""

import argparse
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from tim.generation.settings import SampleSettings, add_sample_arguments, settings_from

if TYPE_CHECKING:
    from tim.generation.prompt_sets import PromptFilesJob, PromptJob

GRID_ROWS, GRID_IMAGES = 16, 4  # prompts, and images of each prompt and number of steps, in a labelled grid


def add_caption_arguments(parser: argparse.ArgumentParser, data_type: str, caption_dir: str, source: str) -> None:
    """The shared flags of the benchmark commands.

    Args:
        data_type: goes in front of the folder's name.
        caption_dir: default of --caption-dir; source: what is expected there.
    """
    add_sample_arguments(parser)
    parser.set_defaults(num_fid_samples=None, num_steps=4)
    parser.add_argument("--caption-dir", default=caption_dir, help=f"{source} (default: %(default)s)")
    parser.add_argument("--data-type", default=data_type, help="first word of the folder's name")
    parser.add_argument("--num-classes", type=int, help=argparse.SUPPRESS)  # in published command lines, means nothing here
    parser.add_argument("--text-padding", choices=("mask", "batch"), help="default: the config's, else mask")


def benchmark_command(args: argparse.Namespace, make_job: "Callable[[argparse.Namespace], PromptJob]") -> None:
    """Draw the images of a benchmark.

    Args:
        args: parsed, with the flags of `add_caption_arguments`.
        make_job: reads the prompts that --caption-dir names.
    """
    if args.num_classes is not None:
        warnings.warn("--num-classes has no effect on text-to-image sampling", stacklevel=2)
    job = make_job(args)
    if args.num_fid_samples is not None:
        if args.num_fid_samples < 1:
            raise ValueError(f"--num-fid-samples must be >= 1, got {args.num_fid_samples}")
        job.first(args.num_fid_samples)
    args.num_fid_samples = job.groups * job.per_group
    draw(args, job, [settings_from(args)], prefix=f"{args.data_type}-")


def draw(args: argparse.Namespace, job: "PromptJob", runs: list[SampleSettings], prefix: str) -> list[Path]:
    """Load the models once and draw `job` under each of the settings.

    Returns:
        the folder of each run.
    """
    from accelerate import PartialState

    from tim.checkpoint.weights import find_weights
    from tim.config import load_config
    from tim.distributed import use_cpu
    from tim.generation import engine
    from tim.generation.captions import CaptionConditions
    from tim.models.text_encoders import build_text_encoder

    config = load_config(args.config)
    if args.text_padding:
        config.model.text_padding = args.text_padding
    if config.model.text_padding == "batch":
        config.model.text_cache = None  # visible padding ties a caption's features to its batch
    weights = find_weights(args.ckpt)
    state = PartialState(cpu=use_cpu())
    encoder = build_text_encoder(config.model, engine.network_dtype(config, args.dtype, state.device), state.device)
    guided = any(s.cfg_scale > 1 for s in runs)
    first = engine.load_sampler(
        config, weights, runs[0], lambda network: CaptionConditions(job.prompts, encoder, network, guided), state.device
    )
    folders = []
    for sampler in [first.at(settings) for settings in runs]:
        folder = Path(args.sample_dir) / sampler.settings.folder_name(weights.stem, prefix)
        extra = {
            "prompts": job.fingerprint,
            "images_per_prompt": job.per_group,
            "text_encoder": encoder.identity,
            "text_padding": config.model.text_padding,
        }
        engine.run_sampling(sampler, job, folder, weights, extra, state)
        folders.append(folder)
    return folders


def parse_size(text: str) -> tuple[int, int]:
    """`768x512` to (height, width).

    Raises:
        ValueError: for anything else.
    """
    height, _, width = text.lower().partition("x")
    if not (height.isdigit() and width.isdigit()):
        raise ValueError(f"--size {text!r} is not of the form HxW, such as 768x512")
    return int(height), int(width)


def finish_prompts(job: "PromptFilesJob", folders: list[Path], steps: list[int]) -> None:
    """prompts.json in every folder, and one labelled grid a size beside them: prompts down, numbers of steps across.

    Rank 0 alone writes.
    """
    from accelerate import PartialState

    from tim.images import labelled_grid, read_png, save_png

    if not PartialState().is_main_process:
        return
    for folder in folders:
        (folder / "prompts.json").write_text(json.dumps(job.prompts, ensure_ascii=False, indent=1), encoding="utf-8")
    for start in range(0, len(folders), len(steps)):
        own = folders[start : start + len(steps)]
        shown = range(min(job.groups, GRID_ROWS))
        rows = [[read_png(path) for folder in own for path in job.files(folder, g)[:GRID_IMAGES]] for g in shown]
        repeats = min(job.per_group, GRID_IMAGES)
        labels = [f"{n} step{'s' * (n > 1)}" if j == 0 else "" for n in steps for j in range(repeats)]
        size = "x".join(map(str, rows[0][0].shape[:2]))
        cell = min(256, max(96, max(rows[0][0].shape[:2])))
        path = own[0].parent / f"grid-{size}.png"
        save_png(path, labelled_grid(rows, job.prompts[: len(rows)], labels, cell))
        print(f"grid in {path}")
