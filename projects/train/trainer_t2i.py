"""Train a text-to-image TiM: trainer_t2i.py --config FILE --project_dir DIR --seed N [a.b=c ...]"""

from tim.cli import run_command
from tim.training.command import train_t2i

if __name__ == "__main__":
    run_command(train_t2i)
