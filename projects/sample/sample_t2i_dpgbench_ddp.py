"""Draw a 2x2 grid of images of every DPG-Bench prompt; run the same command again to continue."""

from tim.cli import command_parser, run_command
from tim.generation.t2i import add_caption_arguments, benchmark_command


def main() -> None:
    parser = command_parser(__doc__)
    add_caption_arguments(parser, "dpgbench", "datasets/dpg_bench/prompts", "folder of DPG-Bench's prompts, <id>.txt")
    parser.add_argument("--images-per-prompt", type=int, default=4, help="images side by side in a file")
    args = parser.parse_args()

    from tim.generation.prompt_sets import DPGJob

    benchmark_command(args, lambda args: DPGJob(args.caption_dir, args.images_per_prompt))


if __name__ == "__main__":
    run_command(main)
