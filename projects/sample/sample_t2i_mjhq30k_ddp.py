"""Draw an image of every MJHQ-30K prompt; run the same command again to continue."""

from tim.cli import run_command
from tim.generation.commands import sample_mjhq30k

if __name__ == "__main__":
    run_command(sample_mjhq30k)
