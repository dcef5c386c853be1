"""Print the scores of a result file of evaluate_images.py: summary_scores.py F.jsonl"""

from tim.cli import run_command
from tim.evaluation.commands import geneval_summary

if __name__ == "__main__":
    run_command(geneval_summary)
