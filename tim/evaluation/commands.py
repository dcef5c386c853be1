"""The command lines of the evaluations. Nothing heavy is imported before the arguments are read, so that --help is fast."""

import argparse
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tim.cli import command_parser, usable_path
from tim.evaluation import CLIP, FEATURES, PROTOCOLS
from tim.evaluation.flags import (
    add_allow_partial,
    add_extract_arguments,
    add_ignored,
    add_inception_arguments,
    check_target,
    parse_arguments,
)

if TYPE_CHECKING:
    from accelerate import PartialState

    from tim.evaluation.extract import Extraction, FeatureExtractor
    from tim.evaluation.inception import InceptionV3


def adm() -> None:
    """FID, sFID, inception score, precision and recall as ADM measures them."""
    parser = command_parser(adm.__doc__)
    real = "an .npz of ADM (images and/or statistics) or a folder of real images"
    parser.add_argument("reference", metavar="REF", type=usable_path, help=real)
    parser.add_argument("samples", metavar="SAMPLES", type=usable_path, help="a folder of generated images or an .npz of them")
    add_inception_arguments(parser)
    args = parse_arguments(parser)

    from tim.evaluation.adm import adm_extractor, evaluate, table

    result = evaluate(args.reference, args.samples, _inception_extraction(args, adm_extractor), args.allow_partial)
    _publish(args.out or _beside(args.samples, "adm.json"), "adm", result, table)


def folder() -> None:
    """How far samples are from real images under features of your choice.

    Fréchet distance, kernel distance (KID), precision and recall. Numbers of different features do not compare.
    """
    parser = command_parser(folder.__doc__)
    parser.add_argument("real", metavar="REAL", type=usable_path, help="folder of real images")
    parser.add_argument("samples", metavar="SAMPLES", type=usable_path, nargs="+", help="folders of generated images")
    parser.add_argument("--features", required=True, choices=FEATURES, help="the network that looks at the images")
    parser.add_argument("--include", nargs="+", default=[], metavar="PATTERN", help="a row for each pattern of relative paths")
    parser.add_argument("--inception", type=usable_path, help="weights for --features inception")
    add_extract_arguments(parser)
    args = parse_arguments(parser)

    from tim.evaluation.features import feature_extractor
    from tim.evaluation.folders import compare_folders, table

    state = start(args.device)
    how = _extraction(args, state, feature_extractor(args.features, state.device, args.inception))
    result = compare_folders(args.real, args.samples, args.include, how, args.allow_partial)
    out = args.out or _beside(args.samples[0], f"folder-{args.features}.json")
    _publish(out, "folder", result, table)


def mjhq_fid() -> None:
    """FID of MJHQ-30K, overall and by category: REF DIR, or REF OUT.npz --save-stats"""
    parser = command_parser(mjhq_fid.__doc__)
    real = "real images, a subfolder a category, or statistics written with --save-stats"
    parser.add_argument("reference", metavar="REF", type=usable_path, help=real)
    parser.add_argument("samples", metavar="DIR", type=usable_path, help="generated images alike, or the file to write")
    parser.add_argument("--protocol", choices=PROTOCOLS, default="tim", help="how images are resized")
    parser.add_argument("--save-stats", action="store_true", help="write the statistics of REF and stop")
    add_inception_arguments(parser)
    add_ignored(parser, data="REF and DIR say it", dims="pool3 has 2048 features")
    add_ignored(parser, is_switch=True, use_dinov2="the features are Inception's")
    args = parse_arguments(parser)
    if args.save_stats:
        check_target(args.samples, "DIR with --save-stats", ".npz")

    from tim.evaluation import mjhq
    from tim.evaluation.inception import pool3_extractor
    from tim.evaluation.samples import BY_CATEGORY, sampled_images

    is_folder = not args.save_stats and args.samples.suffix != ".npz"
    files = sampled_images(args.samples, args.allow_partial, (BY_CATEGORY,)) if is_folder else None
    how = _inception_extraction(args, lambda network: pool3_extractor(network, *mjhq.RESIZES[args.protocol]))
    reference = mjhq.read_set(args.reference, args.protocol, how, "reference")
    if args.save_stats:
        if how.state.is_main_process:
            mjhq.save_statistics(args.samples, reference, args.protocol, how.extractor.identity["weights_sha256"])
            print(f"wrote {args.samples}")
        return
    samples = mjhq.read_set(args.samples, args.protocol, how, "samples", files)
    result = mjhq.fid_result(reference, samples, how.extractor) if how.state.is_main_process else None
    out = args.out or _beside(args.samples, f"fid-{args.protocol}.json")
    _publish(out, f"mjhq-fid-{args.protocol}", result, lambda found: mjhq.table(found, "FID"))


def mjhq_clip() -> None:
    """CLIP score of MJHQ-30K: META.json F.safetensors --save-stats, then F.safetensors DIR

    The first form writes the text features of all prompts, the second compares the images of DIR (category/key.*) with them.
    """
    parser = command_parser(mjhq_clip.__doc__)
    parser.add_argument(
        "source", type=usable_path, metavar="META.json|F.safetensors", help="the prompts, or their text features"
    )
    parser.add_argument("target", type=usable_path, metavar="F.safetensors|DIR", help="the file to write, or generated images")
    parser.add_argument("--save-stats", action="store_true", help="write text features and stop")
    model = "transformers folder or hub id, or open_clip:ARCHITECTURE:TAG"
    parser.add_argument("--clip-model", default=CLIP, help=model)
    add_extract_arguments(parser)
    add_ignored(parser, clip_type="--clip-model names the model", data_type="the features say which prompts there are")
    args = parse_arguments(parser)
    if args.save_stats:
        check_target(args.target, "F.safetensors")

    from tim.evaluation import mjhq
    from tim.evaluation.clip import load_clip
    from tim.files import published

    state = start(args.device)
    clip = load_clip(args.clip_model, state.device)
    if args.save_stats:
        if state.is_main_process:
            count = mjhq.write_text_features(published(str(args.source)), args.target, clip)
            print(f"{count} text features in {args.target}")
        return
    text = mjhq.read_text_features(args.source, clip)
    how = _extraction(args, state, mjhq.clip_extractor(clip))
    result = mjhq.clip_score(text, args.target, clip, how, args.allow_partial)
    out = args.out or _beside(args.target, "clip.json")
    _publish(out, "mjhq-clip", result, lambda found: mjhq.table(found, "CLIP"))


def geneval() -> None:
    """Judge GenEval's images by an object detector and CLIP; run the same command again to continue.

    DIR holds {prompt:05d}/metadata.jsonl and {prompt:05d}/samples/*.png, as sample_t2i_geneval_ddp.py writes them.
    """
    parser = command_parser(geneval.__doc__)
    parser.add_argument("folder", metavar="DIR", type=usable_path, help="folder of the images")
    parser.add_argument("--outfile", type=usable_path, help="result file, .jsonl (default: beside DIR)")
    parser.add_argument("--model-path", required=True, help="the detector: a folder, an mmdet checkpoint or a hub id")
    keys = "threshold, counting_threshold, max_objects, max_overlap, position_threshold, crop, bgcolor, clip_model"
    parser.add_argument("--options", nargs="*", default=[], metavar="KEY=VALUE", help=keys)
    add_ignored(parser, model_config="the checkpoint says which detector it is")
    add_allow_partial(parser)
    args = parse_arguments(parser)

    from tim.evaluation.geneval.rules import parse_options
    from tim.evaluation.geneval.run import evaluate_folder
    from tim.evaluation.geneval.summary import summary_text

    outfile = args.outfile or _beside(args.folder, "geneval.jsonl")
    options = parse_options(args.options)
    scores = evaluate_folder(args.folder, outfile, args.model_path, options, start(), args.allow_partial)
    if scores is not None:
        print(summary_text(scores))
        print(f"wrote {outfile} and {outfile.with_suffix('.json')}")


def geneval_summary() -> None:
    """Print the scores of a result file of evaluate_images.py."""
    parser = command_parser(geneval_summary.__doc__)
    parser.add_argument(
        "results", metavar="F.jsonl", type=usable_path, help="a result file, ours or the published evaluation's"
    )
    args = parse_arguments(parser)

    from tim.evaluation.geneval.summary import read_results, summarize, summary_text

    print(summary_text(summarize(read_results(args.results))))


def dpg() -> None:
    """Score DPG-Bench's images by their answers to its questions; run the same command again to continue.

    The folder holds `{prompt id}.png`, each a square grid of images, as sample_t2i_dpgbench_ddp.py writes them.
    """
    parser = command_parser(dpg.__doc__)
    add = parser.add_argument
    results = "result file; F.json (scores, provenance) and F.detail.json (all answers) go beside it"
    judges = "mplug (the official judge, see requirements_mplug.txt), mplug:FOLDER, or a transformers folder or hub id"
    add("--image-root-path", required=True, type=usable_path, metavar="DIR", dest="folder", help="folder of the images")
    add("--res-path", required=True, type=usable_path, metavar="F.txt", help=results)
    add("--pic-num", type=int, help="how many images of a file, row by row (default: all, 4 where no sampling run tells)")
    add("--resolution", type=int, help="pixels along a side of one image (default: from the file)")
    add("--csv", type=usable_path, default=Path("datasets/dpg_bench/dpg_bench.csv"), help="the questions")
    add("--vqa-model", default="mplug", help=judges)
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of a transformers model")
    add("--batch-size", type=int, default=16, help="questions that a transformers model answers at once")
    add("--answers", type=usable_path, metavar="F.detail.json", help="score these ready answers, ask no model")
    add_allow_partial(parser)
    args = parse_arguments(parser)

    from tim.evaluation.dpg.run import DETAILS, Settings, evaluate_folder
    from tim.files import published

    args.csv = published(str(args.csv))
    settings = Settings(**vars(args))
    text = evaluate_folder(settings, start())
    if text is not None:
        print(text, end="")
        print(f"wrote {settings.res_path}, {settings.beside('.json')} and {settings.beside(DETAILS)}")


def start(device: str | None = None) -> "PartialState":
    """The processes that share the images; TF32 products are off, as published numbers want. The main one alone warns.

    Args:
        device: `cpu`, `cuda` or `cuda:N`; None takes a CUDA device where there is one.

    Raises:
        ValueError: for a device that is not there.
    """
    import torch
    from accelerate import PartialState

    from tim.distributed import set_tf32, use_cpu

    kind, _, number = (device or "").partition(":")
    if device and (kind not in ("cpu", "cuda") or (number and (kind == "cpu" or not number.isdecimal()))):
        raise ValueError(f"--device {device} is neither cpu, cuda nor cuda:N")
    if kind == "cuda" and int(number or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {device} is not there; there are {torch.cuda.device_count()} CUDA devices")
    set_tf32(False)
    if number and kind == "cuda":
        torch.cuda.set_device(int(number))
    state = PartialState(cpu=kind == "cpu" or use_cpu())
    if not state.is_main_process:
        warnings.simplefilter("ignore")
    return state


def _inception_extraction(args: argparse.Namespace, make: Callable[["InceptionV3"], "FeatureExtractor"]) -> "Extraction":
    """Extraction by the features that `make` takes from Inception."""
    from tim.distributed import set_tf32
    from tim.evaluation.inception import load_inception

    state = start(args.device)
    set_tf32(args.precision == "tf32")
    return _extraction(args, state, make(load_inception(args.inception, state.device, args.precision)))


def _extraction(args: argparse.Namespace, state: "PartialState", extractor: "FeatureExtractor") -> "Extraction":
    from tim.evaluation.extract import Extraction

    return Extraction(extractor, state, args.cache, args.batch_size, args.workers)


def _beside(samples: Path, ending: str) -> Path:
    from tim.listing import fit_name

    named = samples if samples.name not in ("", "..") else samples.resolve()
    return named.with_name(fit_name(named.name, f".{ending}"))


def _publish(path: Path, protocol: str, result: dict[str, Any] | None, table: Callable[[dict[str, Any]], str]) -> None:
    """Write a result and print its table; other processes than the main have none.

    Raises:
        ValueError: after that, for the parts that could not be computed.
    """
    from tim.evaluation.results import write_result

    if result is None:
        return
    failed = "; ".join(f"{what}: {why}" for what, why in result.pop("failed", {}).items())
    if not result["scores"]:
        raise ValueError(failed)
    write_result(path, protocol, result | ({"failed": failed} if failed else {}))
    print(table(result))
    print(f"wrote {path}")
    if failed:
        raise ValueError(f"{failed} (the other scores are in {path})")
