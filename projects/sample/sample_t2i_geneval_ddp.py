"""Draw four images of every GenEval prompt; run the same command again to continue."""

import argparse

from tim.cli import run_command


def main() -> None:
    from tim.generation.prompt_sets import GenEvalJob
    from tim.generation.t2i import add_caption_arguments, benchmark_command

    parser = argparse.ArgumentParser(description=__doc__)
    add_caption_arguments(
        parser, "geneval", "datasets/geneval/evaluation_metadata.jsonl", "GenEval's evaluation_metadata.jsonl"
    )
    parser.add_argument("--images-per-prompt", type=int, default=4)
    benchmark_command(parser.parse_args(), lambda args: GenEvalJob(args.caption_dir, args.images_per_prompt))


if __name__ == "__main__":
    run_command(main)
