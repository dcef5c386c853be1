"""Train a class-conditional TiM: trainer_c2i.py --config FILE --project_dir DIR --seed N [a.b=c ...]"""

from tim.cli import run_command, train_command

if __name__ == "__main__":
    run_command(lambda: train_command(__doc__, "ClassTask"))
