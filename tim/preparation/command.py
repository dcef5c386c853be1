"""The command line of preprocessing."""

from tim.cli import add_config_arguments, command_parser, parse_with_overrides, usable_path


def preprocess_square(argv: list[str] | None = None) -> None:
    """Encode class folders of images, centre-cropped to squares.

    Args:
        argv: words of the command line (default: sys.argv).
    """
    _preprocess(argv, "Encode class folders of images, centre-cropped; run the same command again to continue.", "Square")


def preprocess_native(argv: list[str] | None = None) -> None:
    """Encode class folders of images at native resolution; else as `preprocess_square`."""
    _preprocess(argv, "Encode class folders of images at native resolution; run the same command again to continue.", "Native")


def _preprocess(argv: list[str] | None, description: str, kind: str) -> None:
    """Parse and preprocess.

    Args:
        kind: class of `tim.preparation.settings` that says how images are cut.
    """
    parser = command_parser(description)
    run = parser.add_argument_group("run")
    add_config_arguments(run)
    run.add_argument(
        "--project_dir",
        type=usable_path,
        required=True,
        metavar="DIR",
        help="where reports go, and the latents unless latent_dir is set",
    )
    run.add_argument("--seed", type=int, help="of the posterior's noise (default: the file's seed)")
    check = parser.add_argument_group("instead of encoding")
    check.add_argument("--print-config", action="store_true", help="print the complete configuration and stop")
    check.add_argument("--dry-run", action="store_true", help="check everything, say what is to do, write nothing")
    args = parse_with_overrides(parser, argv)

    from tim.config import to_yaml
    from tim.preparation import settings as kinds
    from tim.typed_yaml import build_typed, read_tree

    tree = kinds.from_published(read_tree(args.config, args.overrides), getattr(kinds, kind))
    settings = build_typed(getattr(kinds, kind), tree if args.seed is None else {**tree, "seed": args.seed})
    if args.print_config:
        print(to_yaml(settings))
        return

    from tim.preparation.preprocess import preprocess

    preprocess(settings, args.project_dir, dry_run=args.dry_run)
