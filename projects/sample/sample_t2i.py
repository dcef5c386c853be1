"""Draw images of your own prompts at any sizes and numbers of steps, with a labelled grid of each size."""

from tim.cli import run_command
from tim.generation.commands import sample_t2i

if __name__ == "__main__":
    run_command(sample_t2i)
