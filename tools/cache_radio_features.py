"""Make the REPA features of all training images and their mirrors once: cache_radio_features.py --config FILE [a.b=c ...]

FILE is the training config. The features of N tokens of width D take 4 N D bytes an image in half precision. Run the same
command again to continue; torchrun spreads it over several processes.
"""

from tim.cli import add_config_arguments, check_least, command_parser, parse_with_overrides, run_command


def main() -> None:
    parser = command_parser(__doc__)
    add_config_arguments(parser, "YAML file of the training")
    parser.add_argument("--features-dir", help="where the files go (default: data.dataset.features_dir)")
    parser.add_argument("--dtype", default="float16", choices=("float16", "bfloat16", "float32"), help="of the files")
    parser.add_argument("--batch-size", type=int, default=64, help="images encoded together, with their mirrors")
    parser.add_argument("--num-workers", type=int, default=4, help="processes that read images")
    parser.add_argument("--dry-run", action="store_true", help="check everything, say what is to do, write nothing")
    args = parse_with_overrides(parser)
    check_least(args, batch_size=1, num_workers=0)

    from tim.config import load_config
    from tim.preparation.feature_cache import cache_features

    config = load_config(args.config, args.overrides)
    folder = args.features_dir or config.data.dataset.features_dir
    if folder is None:
        raise ValueError("say where the features go: --features-dir, or data.dataset.features_dir in the config")
    cache_features(config, folder, args.dtype, args.batch_size, args.num_workers, args.dry_run)


if __name__ == "__main__":
    run_command(main)
