"""Print the scores of a result file of evaluate_images.py."""

from pathlib import Path

from tim.cli import command_parser, run_command


def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("results", metavar="F.jsonl", type=Path, help="the --outfile of evaluate_images.py")
    args = parser.parse_args()

    from tim.evaluation.geneval.summary import read_results, summarize, summary_text

    print(summary_text(summarize(read_results(args.results))))


if __name__ == "__main__":
    run_command(main)
