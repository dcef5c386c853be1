"""Draw class-conditional images; run the same command again to continue."""

from tim.cli import run_command
from tim.generation.commands import sample_c2i

if __name__ == "__main__":
    run_command(sample_c2i)
