"""Serve the studio, a page in the browser that draws; see `bash scripts/demo.sh --help`."""

from tim.cli import run_command
from tim.demo.commands import studio

if __name__ == "__main__":
    run_command(studio)
