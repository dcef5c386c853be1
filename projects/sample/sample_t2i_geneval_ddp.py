"""Draw four images of every GenEval prompt; run the same command again to continue."""

from tim.cli import command_parser, run_command
from tim.generation.t2i import add_caption_arguments, benchmark_command


def main() -> None:
    parser = command_parser(__doc__)
    add_caption_arguments(
        parser, "geneval", "datasets/geneval/evaluation_metadata.jsonl", "GenEval's evaluation_metadata.jsonl"
    )
    parser.add_argument("--images-per-prompt", type=int, default=4, help="images of a prompt")
    args = parser.parse_args()

    from tim.generation.prompt_sets import GenEvalJob

    benchmark_command(args, lambda args: GenEvalJob(args.caption_dir, args.images_per_prompt))


if __name__ == "__main__":
    run_command(main)
