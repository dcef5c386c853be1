"""The sampling commands: parse, read what is to be drawn, draw. Heavy imports wait until the command line has been read."""

import argparse
import logging
import shlex
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tim.cli import command_parser
from tim.generation.settings import add_sample_arguments, settings_from, unlike_published

if TYPE_CHECKING:
    from tim.config import Config
    from tim.generation.prompt_sets import PromptSet
    from tim.generation.sampler import Sampler

DATA_TYPES = {"geneval": "geneval", "dpgbench": "dpgbench", "mjhq": "mjhq30k", "mjhq30k": "mjhq30k"}  # and their programs
MAX_NAME = 200  # bytes of a folder's name, which endings are added to

logger = logging.getLogger(__name__)


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
    settings_from(args)  # mistakes are told before anything is imported

    from tim.config import load_config
    from tim.generation.conditions import NO_CLASSES
    from tim.generation.prompt_sets import ClassLabels
    from tim.models.network import traits_of

    config = load_config(args.config)
    if config.model.text_encoder_dir is not None:
        raise ValueError(f"{args.config} is of a text-to-image model; projects/sample/sample_t2i.py draws its prompts")
    network_classes = traits_of(config.model.network).num_classes
    if network_classes is None:
        raise ValueError(NO_CLASSES)
    labels = ClassLabels(args.class_labels, args.num_classes, network_classes, args.global_seed, args.num_fid_samples)
    _draw(args, config, labels, finish=labels.pack_npz if args.npz else None)


def sample_t2i(argv: list[str] | None = None) -> None:
    """Draw images of prompts at any sizes and numbers of steps; else as `sample_c2i`."""
    parser = command_parser(
        "Draw images of your own prompts at any sizes and numbers of steps, with a labelled grid of each size."
    )
    steps = {"nargs": "+", "default": [4], "help": "transitions from noise to image, any numbers of them (default: 4)"}
    add_sample_arguments(parser, num_steps=steps, num_fid_samples={"help": argparse.SUPPRESS})  # the prompts say how many
    own = parser.add_argument_group("prompts and runs")
    source = own.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompts", nargs="+", metavar="TEXT", help="prompts; an empty one is the null caption")
    source.add_argument("--prompt-file", metavar="FILE", help="text file with one prompt a line")
    own.add_argument("--size", nargs="+", metavar="HxW", help="any number of sizes, instead of --height and --width")
    own.add_argument("--images-per-prompt", type=int, default=1, metavar="N", help="images of a prompt, each of its own noise")
    _add_text_padding(own)
    args = parser.parse_args(argv)
    sizes = [(args.height, args.width)]
    if args.size:
        sizes = [_parse_size(text) for text in args.size]
        args.given = {*getattr(args, "given", ()), "height", "width"}
    runs = [{"height": height, "width": width, "num_steps": n} for height, width in sizes for n in args.num_steps]
    for run in runs:
        settings_from(args, **run)

    from tim.generation.engine import save_prompt_grids
    from tim.generation.prompt_sets import PromptFiles, read_prompts

    prompt_set = PromptFiles(args.prompts or read_prompts(args.prompt_file), args.images_per_prompt)

    def finish(*folders: Path) -> None:
        save_prompt_grids(prompt_set, folders, args.num_steps, args.name)

    _draw(args, _caption_config(args), prompt_set, "prompts-", runs, finish)


def sample_geneval(argv: list[str] | None = None) -> None:
    """Draw the images of GenEval's prompts; else as `sample_c2i`."""
    args = _parse_benchmark(
        argv, "geneval", "four images of every GenEval prompt", "geneval/evaluation_metadata.jsonl",
        "--images-per-prompt", type=int, default=4, metavar="N", help="images of a prompt",
    )  # fmt: skip

    from tim.generation.prompt_sets import GenEvalPrompts

    _draw_benchmark(args, GenEvalPrompts(args.caption_dir, args.images_per_prompt))


def sample_dpgbench(argv: list[str] | None = None) -> None:
    """Draw the images of DPG-Bench's prompts; else as `sample_c2i`."""
    args = _parse_benchmark(
        argv, "dpgbench", "a 2x2 grid of images of every DPG-Bench prompt", "dpg_bench/prompts",
        "--images-per-prompt", type=int, default=4, metavar="N", help="images side by side in a file",
    )  # fmt: skip

    from tim.generation.prompt_sets import DPGPrompts

    _draw_benchmark(args, DPGPrompts(args.caption_dir, args.images_per_prompt))


def sample_mjhq30k(argv: list[str] | None = None) -> None:
    """Draw the images of MJHQ-30K's prompts; else as `sample_c2i`."""
    args = _parse_benchmark(
        argv, "mjhq30k", "an image of every MJHQ-30K prompt", "mjhq30k/meta_data.json",
        "--image-format", choices=("png", "jpg"), default="png", help="of the files",
    )  # fmt: skip

    from tim.generation.prompt_sets import MJHQPrompts

    _draw_benchmark(args, MJHQPrompts(args.caption_dir, args.image_format))


def _parse_benchmark(
    argv: list[str] | None, data_type: str, what: str, source: str, own_flag: str, **own_keywords: Any
) -> argparse.Namespace:
    """Read the command line of a benchmark.

    Args:
        data_type: goes in front of the folder's name.
        what: is drawn, for the description.
        source: where tools/download_benchmarks.sh puts the prompts, under datasets/.
        own_flag, own_keywords: the flag that it does not share with the others.
    """
    parser = command_parser(f"Draw {what}; run the same command again to continue.")
    first = {"default": None, "help": "draw the first prompts only, this many (default: all)"}
    add_sample_arguments(parser, num_fid_samples=first, num_steps={"default": 4})
    group = parser.add_argument_group("prompts and files")
    group.add_argument("--caption-dir", default=f"datasets/{source}", metavar="PATH", help="the prompts, as they are published")
    group.add_argument("--data-type", default=data_type, metavar="WORD", help="first word of the folder's name")
    group.add_argument("--num-classes", type=int, help=argparse.SUPPRESS)  # in published command lines, means nothing here
    _add_text_padding(group)
    group.add_argument(own_flag, **own_keywords)
    args = parser.parse_args(argv)
    settings_from(args)
    program = DATA_TYPES.get(args.data_type, data_type)
    if program != data_type:
        right = f"projects/sample/sample_t2i_{program}_ddp.py"
        raise ValueError(f"--data-type {args.data_type} is drawn by {right}; run that with the same flags")
    return args


def _add_text_padding(group: argparse._ArgumentGroup) -> None:
    """The flag of all text-to-image commands."""
    what = "hide the padding of captions from the image, or (batch) show it as the published code does"
    group.add_argument("--text-padding", choices=("mask", "batch"), help=f"{what} (default: the config's)")


def _draw_benchmark(args: argparse.Namespace, prompt_set: "PromptSet") -> None:
    """Draw the images of a benchmark, or of its first prompts."""
    if args.num_classes is not None:
        warnings.warn("--num-classes has no effect on text-to-image sampling", stacklevel=4)  # of the script
    if args.num_fid_samples is not None:
        # still the same set, whose folder can be completed later
        prompt_set.groups = min(args.num_fid_samples, prompt_set.groups)
    _draw(args, _caption_config(args), prompt_set, f"{args.data_type}-")


def _caption_config(args: argparse.Namespace) -> "Config":
    """The config of a text-to-image model, with --text-padding."""
    from tim.config import load_config

    config = load_config(args.config)
    if config.model.text_encoder_dir is None:
        raise ValueError(
            f"{args.config} sets no model.text_encoder_dir; text-to-image needs a text encoder "
            "(projects/sample/sample_c2i_ddp.py draws classes)"
        )
    if args.text_padding:
        config.model.text_padding = args.text_padding
    if config.model.text_padding == "batch":
        config.model.text_cache = None  # visible padding ties a caption's features to its batch
    return config


def _draw(
    args: argparse.Namespace,
    config: "Config",
    prompt_set: "PromptSet",
    prefix: str = "",
    runs: Sequence[dict[str, Any]] = ({},),
    finish: Callable[..., object] | None = None,
) -> None:
    """Load the models once, draw a prompt set in one or several runs, and say which evaluation comes next.

    Args:
        prefix: first words of the folders' names.
        runs: settings of each that are not those of the command line.
        finish: what the main process does in the end with the folders of all runs.
    """
    for flag, name in (("--name", args.name), ("--data-type", prefix or None)):
        if name is not None and (name != Path(name).name or not name.isprintable() or name[:1] in ("", ".", "-")):
            raise ValueError(f"{flag} {name!r} is no plain name for a folder; leave out slashes, and dots and dashes in front")
        if name is not None and len(name.encode()) > MAX_NAME:
            raise ValueError(f"{flag} is longer than {MAX_NAME} bytes")

    from accelerate import PartialState

    from tim.checkpoint.weights import find_weights
    from tim.distributed import use_cpu
    from tim.generation.engine import run_sampling
    from tim.generation.sampler import load_sampler, not_finite

    weights = find_weights(args.ckpt)
    state = PartialState(cpu=use_cpu())
    images = prompt_set.groups * prompt_set.per_group
    settings = [settings_from(args, num_fid_samples=images, **run) for run in runs]
    loaded = load_sampler(config, weights, settings[0], state.device)
    samplers = [loaded.at(own) for own in settings]  # all settings are checked before anything is drawn
    folders = _folders(args, samplers, weights.stem, prefix)
    if state.is_main_process and (values := unlike_published(args, samplers[0].settings)):
        logger.info(values)
    broken: list[str] = []
    for sampler, folder in zip(samplers, folders, strict=True):
        broken += [f"{folder.name}: {name}" for name in run_sampling(sampler, prompt_set, folder, weights, state)]
    if broken:
        raise ValueError(not_finite(broken, images * len(folders)))
    if state.is_main_process:
        if finish:
            finish(*folders)
        print(f"next: python {prompt_set.evaluation.format(folder=shlex.join(map(str, folders)), n=prompt_set.per_group)}")


def _folders(args: argparse.Namespace, samplers: "Sequence[Sampler]", stem: str, prefix: str) -> list[Path]:
    """The folder of every run: --name, with size and steps where there are several runs, else all settings in its name."""
    settings = [sampler.settings for sampler in samplers]
    if args.name is None:
        names = [s.folder_name(stem, prefix) for s in settings]
    elif len(settings) == 1:
        names = [args.name]
    else:
        names = [f"{args.name}-{s.height}x{s.width}-Step-{s.num_steps}" for s in settings]
    return [Path(args.sample_dir) / name for name in names]


def _parse_size(text: str) -> tuple[int, int]:
    """`768x512` to (height, width); ValueError for anything else."""
    height, _, width = text.lower().partition("x")
    if not (height.isdecimal() and width.isdecimal()):
        raise ValueError(f"--size {text!r} is not of the form HxW, such as 768x512")
    return int(height), int(width)
