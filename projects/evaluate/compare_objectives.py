"""Compare training objectives at equal compute: compare_objectives.py digits|shapes --out DIR [--seeds 0 1 2]"""

from tim.benchmarks.commands import compare_objectives
from tim.cli import run_command

if __name__ == "__main__":
    run_command(compare_objectives)
