"""Judge GenEval's images: evaluate_images.py DIR --outfile F.jsonl --model-path DETECTOR"""

from tim.cli import run_command
from tim.evaluation.commands import geneval

if __name__ == "__main__":
    run_command(geneval)
