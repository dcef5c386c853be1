"""The trainers' command line."""

import os
import pkgutil

from tim.cli import add_config_arguments, command_parser, parse_with_overrides, usable_path

EXPORT = "tim.pipelines.convert:export_run"


def train_c2i(argv: list[str] | None = None) -> None:
    """Train a class-conditional model, on one process or under torchrun or accelerate launch.

    Args:
        argv: words of the command line (default: sys.argv).
    """
    _train(argv, "Train a class-conditional TiM; run the same command again to continue.", "ClassTask")


def train_t2i(argv: list[str] | None = None) -> None:
    """Train a text-to-image model; else as `train_c2i`."""
    _train(argv, "Train a text-to-image TiM; run the same command again to continue.", "CaptionTask")


def _train(argv: list[str] | None, description: str, task: str) -> None:
    """Parse and train.

    Args:
        task: class of `tim.training.tasks` that says what is trained.
    """
    parser = command_parser(description)
    run = parser.add_argument_group("run")
    add_config_arguments(run)
    run.add_argument(
        "--project_dir", type=usable_path, required=True, metavar="DIR", help="where log, samples and checkpoints go"
    )
    run.add_argument("--seed", type=int, default=0, help="of weights, data order, noise and times")
    run.add_argument(
        "--allow-changes", action="store_true",
        help="continue with another dataset, network, transport or optimiser than the checkpoint's",
    )  # fmt: skip
    check = parser.add_argument_group("instead of training")
    check.add_argument("--print-config", action="store_true", help="print the complete configuration and stop")
    check.add_argument("--dry-run", action="store_true", help="build and check everything, write nothing")
    args = parse_with_overrides(parser, argv)

    from tim.config import load_config, to_yaml

    config = load_config(args.config, args.overrides)
    if args.print_config:
        print(to_yaml(config))
        return

    from tim.distributed import leave_process_group
    from tim.training import tasks
    from tim.training.loop import train

    # By its name, as console scripts find commands: it takes seconds to import, and trainers need no pipelines.
    export = pkgutil.resolve_name(EXPORT) if config.training.export_pipeline else None
    if export:
        export(config, args.project_dir, check_only=True)
    train(config, args.project_dir, args.seed, getattr(tasks, task), args.dry_run, args.allow_changes)
    if export and not args.dry_run:
        leave_process_group()  # reading sharded weights would wait for the other processes
        if int(os.environ.get("RANK", 0)) == 0:
            export(config, args.project_dir)
