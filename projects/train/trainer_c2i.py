"""Train a class-conditional TiM: trainer_c2i.py --config FILE --project_dir DIR --seed N [a.b=c ...]"""

from tim.cli import run_command
from tim.training.command import train_c2i

if __name__ == "__main__":
    run_command(train_c2i)
