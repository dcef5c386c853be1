"""What the command lines share."""

import argparse
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tim.config import Config


def run_command(main: Callable[[], None]) -> None:
    """Run `main`; ValueError and FileNotFoundError become `error: ...` and exit code 2 (a traceback with TIM_DEBUG=1)."""
    try:
        main()
    except (ValueError, FileNotFoundError) as error:
        if os.environ.get("TIM_DEBUG") == "1":
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def train_command(description: str) -> tuple[argparse.Namespace, "Config | None"]:
    """Parse a trainer's command line.

    Returns:
        the arguments, and the configuration; None when --print-config was all that was asked for.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--config", required=True, help="YAML file")
    parser.add_argument("--project_dir", required=True, help="where log, samples and checkpoints go")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--print-config", action="store_true", help="print the complete configuration and stop")
    parser.add_argument("--dry-run", action="store_true", help="build and check everything, write nothing")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="configuration overrides")
    args = parser.parse_intermixed_args()

    from tim.config import load_config, to_yaml

    config = load_config(args.config, args.overrides)
    if args.print_config:
        print(to_yaml(config))
        return args, None
    return args, config
