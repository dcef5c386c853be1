"""How far samples are from real images under features of your choice: evaluate_folder.py REAL SAMPLES [SAMPLES ...]"""

from tim.cli import run_command
from tim.evaluation.commands import folder

if __name__ == "__main__":
    run_command(folder)
