"""Train a text-to-image TiM: trainer_t2i.py --config FILE --project_dir DIR --seed N [a.b=c ...]"""

from tim.cli import run_command, train_command


def main() -> None:
    args, config = train_command(__doc__)
    if config is None:
        return

    from tim.training.loop import train
    from tim.training.tasks import CaptionTask

    train(config, args.project_dir, args.seed, CaptionTask, dry_run=args.dry_run)


if __name__ == "__main__":
    run_command(main)
