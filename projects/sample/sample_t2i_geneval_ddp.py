"""Draw four images of every GenEval prompt; run the same command again to continue."""

from tim.cli import run_command
from tim.generation.commands import sample_geneval

if __name__ == "__main__":
    run_command(sample_geneval)
