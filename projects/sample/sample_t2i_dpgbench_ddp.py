"""Draw a 2x2 grid of images of every DPG-Bench prompt; run the same command again to continue."""

from tim.cli import run_command
from tim.generation.commands import sample_dpgbench

if __name__ == "__main__":
    run_command(sample_dpgbench)
