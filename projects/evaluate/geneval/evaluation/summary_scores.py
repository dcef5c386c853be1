"""Print the scores of a result file of evaluate_images.py."""

import argparse
from pathlib import Path

from tim.cli import run_command


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", metavar="F.jsonl", type=Path)
    args = parser.parse_args()

    from tim.evaluation.geneval.summary import read_results, summarize, summary_text

    print(summary_text(summarize(read_results(args.results))))


if __name__ == "__main__":
    run_command(main)
