"""The sampling commands: parse, read what is to be drawn, draw. Heavy imports wait until the command line has been read."""

import argparse
import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from tim.cli import command_parser
from tim.generation.settings import SampleSettings, add_sample_arguments, settings_from

if TYPE_CHECKING:
    from tim.config import Config
    from tim.generation.prompt_sets import PromptSet


def sample_c2i(argv: list[str] | None = None) -> None:
    """Draw class-conditional images.

    Args:
        argv: words of the command line (default: sys.argv).
    """
    parser = command_parser("Draw class-conditional images; run the same command again to continue.")
    add_sample_arguments(parser)
    classes = parser.add_argument_group("classes and files")
    classes.add_argument("--num-classes", type=int, help="labels cycle through this many classes (default: all)")
    classes.add_argument("--class-labels", default="cycle", help="cycle | random | a list such as 207,360")
    classes.add_argument("--npz", action="store_true", help="also pack the images for ADM's evaluator")
    args = parser.parse_args(argv)

    from accelerate import PartialState

    from tim.config import load_config
    from tim.generation.conditions import NO_CLASSES
    from tim.generation.prompt_sets import ClassLabels
    from tim.models.network import traits_of

    config = load_config(args.config)
    network_classes = traits_of(config.model.network).num_classes
    if network_classes is None:
        raise ValueError(NO_CLASSES)
    labels = ClassLabels(args.class_labels, args.num_classes, network_classes, args.global_seed, args.num_fid_samples)
    (folder,) = _draw(args, config, labels, [settings_from(args)])
    if args.npz and PartialState().is_main_process:
        labels.pack_npz(folder)


def sample_t2i(argv: list[str] | None = None) -> None:
    """Draw images of prompts at any sizes and numbers of steps; else as `sample_c2i`."""
    parser = command_parser(
        "Draw images of your own prompts at any sizes and numbers of steps, with a labelled grid of each size."
    )
    parser.conflict_handler = "resolve"  # --num-steps takes several
    add_sample_arguments(parser)
    own = parser.add_argument_group("prompts and runs")
    source = own.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompts", nargs="+", metavar="TEXT", help="prompts; an empty one is the null caption")
    source.add_argument("--prompt-file", help="text file with one prompt a line")
    own.add_argument("--size", nargs="+", metavar="HxW", help="height x width in pixels, any number of sizes")
    own.add_argument("--num-steps", nargs="+", type=int, default=[4], help="any number of step counts (default: 4)")
    own.add_argument("--images-per-prompt", type=int, default=1, help="images of a prompt, each of its own seed")
    own.add_argument("--text-padding", choices=("mask", "batch"), help="default: the config's, else mask")
    args = parser.parse_args(argv)

    from accelerate import PartialState

    from tim.generation.engine import save_prompt_grids
    from tim.generation.prompt_sets import PromptFiles, read_prompts

    prompt_set = PromptFiles(args.prompts or read_prompts(args.prompt_file), args.images_per_prompt)
    sizes = [_parse_size(text) for text in args.size] if args.size else [(args.height, args.width)]
    args.num_fid_samples = prompt_set.groups * prompt_set.per_group
    base = settings_from(args)
    runs = [replace(base, height=h, width=w, num_steps=n) for h, w in sizes for n in args.num_steps]
    folders = _draw(args, _caption_config(args), prompt_set, runs, "prompts-")
    if PartialState().is_main_process:
        save_prompt_grids(prompt_set, folders, args.num_steps)


def sample_geneval(argv: list[str] | None = None) -> None:
    """Draw the images of GenEval's prompts; else as `sample_c2i`."""
    file = "evaluation_metadata.jsonl"
    parser = _benchmark_parser(
        "four images of every GenEval prompt", "geneval", f"datasets/geneval/{file}", f"GenEval's {file}"
    )
    parser.add_argument("--images-per-prompt", type=int, default=4, help="images of a prompt")
    _draw_benchmark(parser.parse_args(argv), "GenEvalPrompts")


def sample_dpgbench(argv: list[str] | None = None) -> None:
    """Draw the images of DPG-Bench's prompts; else as `sample_c2i`."""
    what, source = "a 2x2 grid of images of every DPG-Bench prompt", "folder of DPG-Bench's prompts, <id>.txt"
    parser = _benchmark_parser(what, "dpgbench", "datasets/dpg_bench/prompts", source)
    parser.add_argument("--images-per-prompt", type=int, default=4, help="images side by side in a file")
    _draw_benchmark(parser.parse_args(argv), "DPGPrompts")


def sample_mjhq30k(argv: list[str] | None = None) -> None:
    """Draw the images of MJHQ-30K's prompts; else as `sample_c2i`."""
    what, file = "an image of every MJHQ-30K prompt", "meta_data.json"
    parser = _benchmark_parser(what, "mjhq30k", f"datasets/mjhq30k/{file}", f"MJHQ-30K's {file}")
    parser.add_argument("--image-format", choices=("png", "jpg"), default="png", help="of the files")
    _draw_benchmark(parser.parse_args(argv), "MJHQPrompts")


def _benchmark_parser(what: str, data_type: str, caption_dir: str, source: str) -> argparse.ArgumentParser:
    """The shared flags of the benchmarks.

    Args:
        what: is drawn, for the description.
        data_type: goes in front of the folder's name.
        caption_dir: default of --caption-dir; source: what is expected there.
    """
    parser = command_parser(f"Draw {what}; run the same command again to continue.")
    add_sample_arguments(parser)
    parser.set_defaults(num_fid_samples=None, num_steps=4)
    parser.add_argument("--caption-dir", default=caption_dir, help=f"{source} (default: %(default)s)")
    parser.add_argument("--data-type", default=data_type, help="first word of the folder's name")
    parser.add_argument("--num-classes", type=int, help=argparse.SUPPRESS)  # in published command lines, means nothing here
    parser.add_argument("--text-padding", choices=("mask", "batch"), help="default: the config's, else mask")
    return parser


def _draw_benchmark(args: argparse.Namespace, prompt_set_class: str) -> None:
    """Draw the images of a benchmark, or of its first prompts.

    Args:
        prompt_set_class: of `tim.generation.prompt_sets`, made of --caption-dir and the benchmark's own flag.
    """
    from tim.generation import prompt_sets

    if args.num_classes is not None:
        warnings.warn("--num-classes has no effect on text-to-image sampling", stacklevel=4)  # of the script
    own = args.image_format if "image_format" in args else args.images_per_prompt
    prompt_set = getattr(prompt_sets, prompt_set_class)(args.caption_dir, own)
    if args.num_fid_samples is not None:
        if args.num_fid_samples < 1:
            raise ValueError(f"--num-fid-samples must be >= 1, got {args.num_fid_samples}")
        prompt_set.first(args.num_fid_samples)
    args.num_fid_samples = prompt_set.groups * prompt_set.per_group
    _draw(args, _caption_config(args), prompt_set, [settings_from(args)], f"{args.data_type}-")


def _caption_config(args: argparse.Namespace) -> "Config":
    """The config of a text-to-image model, with --text-padding."""
    from tim.config import load_config

    config = load_config(args.config)
    if config.model.text_encoder_dir is None:
        raise ValueError("model.text_encoder_dir is not set; text-to-image needs a text encoder")
    if args.text_padding:
        config.model.text_padding = args.text_padding
    if config.model.text_padding == "batch":
        config.model.text_cache = None  # visible padding ties a caption's features to its batch
    return config


def _draw(
    args: argparse.Namespace, config: "Config", prompt_set: "PromptSet", runs: list[SampleSettings], prefix: str = ""
) -> list[Path]:
    """Load the models once and draw a prompt set under each of the settings.

    Args:
        prefix: first words of the folders' names.

    Returns:
        the folder of each run.
    """
    from accelerate import PartialState

    from tim.checkpoint.weights import find_weights
    from tim.distributed import use_cpu
    from tim.generation.engine import run_sampling
    from tim.generation.sampler import load_sampler

    weights = find_weights(args.ckpt)
    state = PartialState(cpu=use_cpu())
    loaded = load_sampler(config, weights, runs[0], state.device)
    identity = prompt_set.identity | loaded.conditions.identity
    folders = []
    for sampler in [loaded.at(settings) for settings in runs]:  # all settings are checked before anything is drawn
        folder = Path(args.sample_dir) / sampler.settings.folder_name(weights.stem, prefix)
        run_sampling(sampler, prompt_set, folder, weights, identity, state)
        folders.append(folder)
    return folders


def _parse_size(text: str) -> tuple[int, int]:
    """`768x512` to (height, width); ValueError for anything else."""
    height, _, width = text.lower().partition("x")
    if not (height.isdigit() and width.isdigit()):
        raise ValueError(f"--size {text!r} is not of the form HxW, such as 768x512")
    return int(height), int(width)
