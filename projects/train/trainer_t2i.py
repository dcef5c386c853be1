"""Train a text-to-image TiM: trainer_t2i.py --config FILE --project_dir DIR --seed N [a.b=c ...]"""

from tim.cli import run_command, train_command

if __name__ == "__main__":
    run_command(lambda: train_command(__doc__, "CaptionTask"))
