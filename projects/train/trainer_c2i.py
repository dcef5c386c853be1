"""Train a class-conditional TiM: trainer_c2i.py --config FILE --project_dir DIR --seed N [a.b=c ...]"""

import argparse

from tim.cli import run_command


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
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

    from tim.training.loop import train

    train(config, args.project_dir, args.seed, dry_run=args.dry_run)


if __name__ == "__main__":
    run_command(main)
