"""Judge GenEval's images by an object detector and CLIP; run the same command again to continue.

DIR holds {prompt:05d}/metadata.jsonl and {prompt:05d}/samples/*.png, as sample_t2i_geneval_ddp.py writes them.
"""

import warnings
from pathlib import Path

from tim.cli import command_parser, run_command
from tim.evaluation.command import result_path, start


def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("folder", metavar="DIR", type=Path, help="folder of the images")
    parser.add_argument("--outfile", type=Path, help="result file, .jsonl (default: beside DIR)")
    judge = parser.add_argument_group("judge")
    judge.add_argument("--model-path", required=True, help="the detector: a folder, an mmdet checkpoint or a hub id")
    judge.add_argument("--model-config", help="no effect: the checkpoint says which detector it is")
    judge.add_argument(
        "--options", nargs="*", default=[], metavar="KEY=VALUE",
        help="threshold, counting_threshold, max_objects, max_overlap, position_threshold, crop, bgcolor, clip_model",
    )  # fmt: skip
    args = parser.parse_args()

    from tim.distributed import set_tf32
    from tim.evaluation.geneval.options import parse_options
    from tim.evaluation.geneval.run import evaluate_folder
    from tim.evaluation.geneval.summary import summary_text

    if args.model_config is not None:
        warnings.warn(f"--model-config {args.model_config} has no effect and is ignored", stacklevel=1)
    set_tf32(False)
    outfile = args.outfile or result_path(None, args.folder, "geneval").with_suffix(".jsonl")
    scores = evaluate_folder(args.folder, outfile, args.model_path, parse_options(args.options), start())
    if scores is not None:
        print(summary_text(scores))
        print(f"wrote {outfile} and {outfile.with_suffix('.json')}")


if __name__ == "__main__":
    run_command(main)
