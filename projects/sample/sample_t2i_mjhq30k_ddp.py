"""Draw an image of every MJHQ-30K prompt; run the same command again to continue."""

import argparse

from tim.cli import run_command


def main() -> None:
    from tim.generation.prompt_sets import MJHQJob
    from tim.generation.t2i import add_caption_arguments, benchmark_command

    parser = argparse.ArgumentParser(description=__doc__)
    add_caption_arguments(parser, "mjhq30k", "datasets/mjhq30k/meta_data.json", "MJHQ-30K's meta_data.json")
    parser.add_argument("--image-format", choices=("png", "jpg"), default="png")
    benchmark_command(parser.parse_args(), lambda args: MJHQJob(args.caption_dir, args.image_format))


if __name__ == "__main__":
    run_command(main)
