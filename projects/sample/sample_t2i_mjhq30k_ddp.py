"""Draw an image of every MJHQ-30K prompt; run the same command again to continue."""

from tim.cli import command_parser, run_command
from tim.generation.t2i import add_caption_arguments, benchmark_command


def main() -> None:
    parser = command_parser(__doc__)
    add_caption_arguments(parser, "mjhq30k", "datasets/mjhq30k/meta_data.json", "MJHQ-30K's meta_data.json")
    parser.add_argument("--image-format", choices=("png", "jpg"), default="png", help="of the files")
    args = parser.parse_args()

    from tim.generation.prompt_sets import MJHQJob

    benchmark_command(args, lambda args: MJHQJob(args.caption_dir, args.image_format))


if __name__ == "__main__":
    run_command(main)
