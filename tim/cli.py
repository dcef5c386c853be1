"""What the command lines share."""

import argparse
import os
import sys
import warnings
from collections.abc import Callable


def run_command(main: Callable[[], None]) -> None:
    """Run `main`; ValueError and FileNotFoundError become `error: ...` and exit code 2 (a traceback with TIM_DEBUG=1).

    Warnings are printed as `warning: ...`, without the line of code that raised them. In the end the process group is left,
    if `main` started one.
    """
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    failed = True
    try:
        main()
        failed = False
    except SystemExit:  # of all processes alike, such as a trainer's on a signal
        failed = False
        raise
    except (ValueError, FileNotFoundError) as error:
        if os.environ.get("TIM_DEBUG") == "1":
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    finally:
        _leave_process_group(failed)


def _leave_process_group(failed: bool) -> None:
    """`tim.distributed.leave_process_group`, where there can be a group: commands without torch end sooner."""
    if "torch" in sys.modules:
        from tim.distributed import leave_process_group

        leave_process_group(failed)


def train_command(description: str, task: str) -> None:
    """A trainer's command line.

    Args:
        task: class of `tim.training.tasks` that says what is trained.
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
        return

    from tim.training import tasks
    from tim.training.loop import train

    train(config, args.project_dir, args.seed, getattr(tasks, task), dry_run=args.dry_run)


def preprocess_command(description: str, kind: str) -> None:
    """The command line of preprocessing.

    Args:
        kind: class of `tim.preparation.settings` that says how images are cut.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--config", required=True, help="YAML file")
    parser.add_argument("--project_dir", required=True, help="where reports go, and the latents unless latent_dir is set")
    parser.add_argument("--print-config", action="store_true", help="print the complete configuration and stop")
    parser.add_argument("--dry-run", action="store_true", help="check everything, say what is to do, write nothing")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="configuration overrides")
    args = parser.parse_intermixed_args()

    from tim.config import to_yaml
    from tim.preparation import settings as preprocess_config

    settings = preprocess_config.load_settings(getattr(preprocess_config, kind), args.config, args.overrides)
    if args.print_config:
        print(to_yaml(settings))
        return

    from tim.preparation.preprocess import preprocess

    preprocess(settings, args.project_dir, dry_run=args.dry_run)
