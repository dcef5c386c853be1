"""The command lines of the evaluations. Nothing heavy is imported before the arguments are read, so that --help is fast."""

import argparse
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tim.cli import command_parser
from tim.evaluation import BATCH, CACHE, CLIP, FEATURES, PROTOCOLS

if TYPE_CHECKING:
    from accelerate import PartialState

    from tim.evaluation.extract import Extraction, FeatureExtractor
    from tim.evaluation.inception import InceptionV3


def adm(argv: list[str] | None = None) -> None:
    """FID, sFID, inception score, precision and recall as ADM measures them.

    REF: an .npz of ADM (images and/or statistics) or a folder of real images. SAMPLES: a folder of images or an .npz.
    """
    parser = command_parser(adm.__doc__)
    parser.add_argument("reference", metavar="REF", type=Path)
    parser.add_argument("samples", metavar="SAMPLES", type=Path)
    _add_inception_arguments(parser)
    args = _parse(parser, argv)

    from tim.evaluation.adm import adm_extractor, evaluate, table

    state = start()
    result = evaluate(args.reference, args.samples, _extraction(args, state, adm_extractor(_load_inception(args, state))))
    if result is not None:
        _publish(args, args.samples, "adm", "adm", result, table(result))


def folder(argv: list[str] | None = None) -> None:
    """How far samples are from real images under features of your choice.

    Fréchet distance, kernel distance (KID), precision and recall. Numbers of different features do not compare.
    """
    parser = command_parser(folder.__doc__)
    parser.add_argument("real", metavar="REAL", type=Path, help="folder of real images")
    parser.add_argument("samples", metavar="SAMPLES", type=Path, nargs="+", help="folders of generated images")
    parser.add_argument("--features", required=True, choices=FEATURES)
    parser.add_argument("--include", nargs="+", default=[], metavar="PATTERN", help="a row for each pattern of relative paths")
    parser.add_argument("--inception", type=Path, help="weights for --features inception")
    _add_extract_arguments(parser)
    args = _parse(parser, argv)

    from tim.evaluation.features import feature_extractor
    from tim.evaluation.folders import compare_folders, table

    state = start()
    how = _extraction(args, state, feature_extractor(args.features, state.device, args.inception))
    result = compare_folders(args.real, args.samples, args.include, how)
    if result is not None:
        _publish(args, args.samples[0], f"folder-{args.features}", "folder", result, table(result))


def mjhq_fid(argv: list[str] | None = None) -> None:
    """FID of MJHQ-30K, overall and by category: REF DIR, or REF OUT.npz --save-stats

    REF and DIR: folders with one subfolder a category, or statistics written with --save-stats.
    """
    parser = command_parser(mjhq_fid.__doc__)
    parser.add_argument("reference", metavar="REF", type=Path)
    parser.add_argument("samples", metavar="DIR", type=Path, help="generated images, or the file to write")
    parser.add_argument("--protocol", choices=PROTOCOLS, default="tim", help="how images are resized (default: %(default)s)")
    parser.add_argument("--save-stats", action="store_true", help="write the statistics of REF and stop")
    _add_inception_arguments(parser)
    args = _parse(parser, argv)

    from tim.evaluation import mjhq

    state = start()
    how = _extraction(args, state, mjhq.fid_extractor(_load_inception(args, state), args.protocol))
    reference = mjhq.read_set(args.reference, args.protocol, how, "reference")
    samples = None if args.save_stats else mjhq.read_set(args.samples, args.protocol, how, "samples")
    if not state.is_main_process:
        return
    if samples is None:
        mjhq.save_statistics(args.samples, reference, args.protocol, how.extractor.identity["weights_sha256"])
        print(f"wrote {args.samples}")
        return
    result = mjhq.fid_result(reference, samples, how.extractor)
    _publish(args, args.samples, f"fid-{args.protocol}", f"mjhq-fid-{args.protocol}", result, mjhq.table(result, "FID"))


def mjhq_clip(argv: list[str] | None = None) -> None:
    """CLIP score of MJHQ-30K: META.json F.safetensors --save-stats, then F.safetensors DIR

    The first form writes the text features of all prompts, the second compares the images of DIR (category/key.*) with them.
    """
    parser = command_parser(mjhq_clip.__doc__)
    parser.add_argument("source", type=Path, metavar="META.json|F.safetensors")
    parser.add_argument("target", type=Path, metavar="F.safetensors|DIR")
    parser.add_argument("--save-stats", action="store_true", help="write text features and stop")
    parser.add_argument(
        "--clip-model", default=CLIP,
        help="transformers folder or hub id, or open_clip:ARCHITECTURE:TAG (default: %(default)s)",
    )  # fmt: skip
    _add_extract_arguments(parser)
    args = _parse(parser, argv)

    from tim.evaluation import mjhq
    from tim.evaluation.clip import load_clip

    state = start()
    clip = load_clip(args.clip_model, state.device)
    if args.save_stats:
        if state.is_main_process:
            print(f"{mjhq.write_text_features(args.source, args.target, clip)} text features in {args.target}")
        return
    text = mjhq.read_text_features(args.source, clip)
    result = mjhq.clip_score(text, args.target, clip, _extraction(args, state, mjhq.clip_extractor(clip)))
    if result is not None:
        _publish(args, args.target, "clip", "mjhq-clip", result, mjhq.table(result, "CLIP"))


def geneval(argv: list[str] | None = None) -> None:
    """Judge GenEval's images by an object detector and CLIP; run the same command again to continue.

    DIR holds {prompt:05d}/metadata.jsonl and {prompt:05d}/samples/*.png, as sample_t2i_geneval_ddp.py writes them.
    """
    parser = command_parser(geneval.__doc__)
    parser.add_argument("folder", metavar="DIR", type=Path)
    parser.add_argument("--outfile", type=Path, help="result file, .jsonl (default: beside DIR)")
    parser.add_argument("--model-path", required=True, help="the detector: a folder, an mmdet checkpoint or a hub id")
    parser.add_argument("--model-config", help="no effect: the checkpoint says which detector it is")
    parser.add_argument(
        "--options", nargs="*", default=[], metavar="KEY=VALUE",
        help="threshold, counting_threshold, max_objects, max_overlap, position_threshold, crop, bgcolor, clip_model",
    )  # fmt: skip
    args = _parse(parser, argv)

    from tim.evaluation.geneval.rules import parse_options
    from tim.evaluation.geneval.run import evaluate_folder
    from tim.evaluation.geneval.summary import summary_text

    if args.model_config is not None:
        warnings.warn(f"--model-config {args.model_config} has no effect and is ignored", stacklevel=1)
    outfile = args.outfile or _beside(args.folder, "geneval.jsonl")
    scores = evaluate_folder(args.folder, outfile, args.model_path, parse_options(args.options), start())
    if scores is not None:
        print(summary_text(scores))
        print(f"wrote {outfile} and {outfile.with_suffix('.json')}")


def geneval_summary(argv: list[str] | None = None) -> None:
    """Print the scores of a result file of evaluate_images.py."""
    parser = command_parser(geneval_summary.__doc__)
    parser.add_argument("results", metavar="F.jsonl", type=Path)
    args = _parse(parser, argv)

    from tim.evaluation.geneval.summary import read_results, summarize, summary_text

    print(summary_text(summarize(read_results(args.results))))


def dpg(argv: list[str] | None = None) -> None:
    """Score DPG-Bench's images by their answers to its questions; run the same command again to continue.

    The folder holds `{prompt id}.png`, each a square grid of images, as sample_t2i_dpgbench_ddp.py writes them.
    """
    parser = command_parser(dpg.__doc__)
    parser.add_argument(
        "--image-root-path", required=True, type=Path, metavar="DIR", dest="folder", help="folder of the images"
    )
    parser.add_argument(
        "--res-path", required=True, type=Path, metavar="F.txt",
        help="result file; F.json (scores, provenance) and F.detail.json (all answers) go beside it",
    )  # fmt: skip
    parser.add_argument("--pic-num", type=int, default=4, help="images in a file: 4 are a 2x2 grid (default: %(default)s)")
    parser.add_argument("--resolution", type=int, help="pixels along a side of one image (default: from the file)")
    parser.add_argument("--csv", type=Path, default=Path("datasets/dpg_bench/dpg_bench.csv"), help="the questions")
    parser.add_argument(
        "--vqa-model", default="mplug",
        help="mplug (the official judge, see requirements_mplug.txt), mplug:FOLDER, or a transformers folder or hub id",
    )  # fmt: skip
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of a transformers model")
    parser.add_argument("--batch-size", type=int, default=16, help="questions it answers at once (default: %(default)s)")
    parser.add_argument("--answers", type=Path, metavar="F.detail.json", help="score these ready answers, ask no model")
    args = _parse(parser, argv)

    from tim.evaluation.dpg.run import Settings, evaluate_folder

    settings = Settings(**vars(args))
    text = evaluate_folder(settings, start())
    if text is not None:
        print(text, end="")
        print(f"wrote {settings.res_path}, {settings.beside('.json')} and {settings.details}")


def start() -> "PartialState":
    """The processes that share the images; TF32 products are off, as published numbers want."""
    from accelerate import PartialState

    from tim.distributed import set_tf32, use_cpu

    set_tf32(False)
    return PartialState(cpu=use_cpu())


def _parse(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """Arguments, with sizes in range.

    Raises:
        ValueError: names the flag that is not.
    """
    args = parser.parse_args(argv)
    for name, least in (("batch_size", 1), ("resolution", 1), ("workers", 0)):
        value = getattr(args, name, None)
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} must be >= {least}, got {value}")
    return args


def _add_extract_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of feature extraction."""
    parser.add_argument("--batch-size", type=int, default=BATCH, help="images a batch (default: %(default)s)")
    parser.add_argument("--workers", type=int, help="processes that read images (default: up to 8)")
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder of kept features (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="result file (default: beside the samples)")


def _add_inception_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of evaluations with Inception features."""
    _add_extract_arguments(parser)
    parser.add_argument("--inception", type=Path, help=".pth of torch-fidelity or classify_image_graph_def.pb")
    parser.add_argument(
        "--precision", choices=("float32", "tf32", "bfloat16"), default="float32",
        help="tf32 and bfloat16 are faster and move scores a little (default: %(default)s)",
    )  # fmt: skip


def _load_inception(args: argparse.Namespace, state: "PartialState") -> "InceptionV3":
    from tim.distributed import set_tf32
    from tim.evaluation.inception import load_inception

    set_tf32(args.precision == "tf32")
    return load_inception(args.inception, state.device, args.precision)


def _extraction(args: argparse.Namespace, state: "PartialState", extractor: "FeatureExtractor") -> "Extraction":
    from tim.evaluation.extract import Extraction

    return Extraction(extractor, state, args.cache, args.batch_size, args.workers)


def _beside(samples: Path, ending: str) -> Path:
    return samples.with_name(f"{samples.name}.{ending}")


def _publish(args: argparse.Namespace, samples: Path, name: str, protocol: str, result: dict[str, Any], text: str) -> None:
    """Write a result to --out, or `<samples>.<name>.json` beside the samples, and print it."""
    from tim.evaluation.results import write_result

    path = args.out or _beside(samples, f"{name}.json")
    write_result(path, protocol, result)
    print(text)
    print(f"wrote {path}")
