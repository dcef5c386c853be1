"""Score DPG-Bench's images by their answers to its questions; run the same command again to continue.

The folder holds `{prompt id}.png`, each a square grid of images, as sample_t2i_dpgbench_ddp.py writes them.
"""

from pathlib import Path

from tim.cli import command_parser, run_command
from tim.evaluation.command import start


def main() -> None:
    parser = command_parser(__doc__)
    files = parser.add_argument_group("images and results")
    files.add_argument("--image-root-path", required=True, type=Path, metavar="DIR", help="folder of the images")
    files.add_argument(
        "--res-path", required=True, type=Path, metavar="F.txt",
        help="result file; F.json (scores, provenance) and F.detail.json (all answers) go beside it",
    )  # fmt: skip
    files.add_argument("--pic-num", type=int, default=4, help="images in a file: 4 are a 2x2 grid")
    files.add_argument("--resolution", type=int, help="pixels along a side of one image (default: from the file)")
    judge = parser.add_argument_group("questions and judge")
    judge.add_argument("--csv", type=Path, default=Path("datasets/dpg_bench/dpg_bench.csv"), help="the questions")
    judge.add_argument(
        "--vqa-model", default="mplug",
        help="mplug (the official judge, see requirements_mplug.txt), mplug:FOLDER, or a transformers folder or hub id",
    )  # fmt: skip
    judge.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of a transformers model")
    judge.add_argument("--batch-size", type=int, default=16, help="questions it answers at once")
    judge.add_argument("--answers", type=Path, metavar="F.detail.json", help="score these ready answers, ask no model")
    args = parser.parse_args()
    for name in ("batch_size", "resolution"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be >= 1, got {value}")

    from tim.distributed import set_tf32
    from tim.evaluation.dpg.run import Settings, evaluate_folder

    set_tf32(False)
    options = vars(args)
    settings = Settings(folder=options.pop("image_root_path"), **options)
    text = evaluate_folder(settings, start())
    if text is not None:
        print(text, end="")
        print(f"wrote {settings.res_path}, {settings.beside('.json')} and {settings.details}")


if __name__ == "__main__":
    run_command(main)
