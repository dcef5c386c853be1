"""Measure digits drawn by sample_c2i_ddp.py: evaluate_digits.py --samples DIR --out DIR"""

from tim.cli import run_command
from tim.demo.commands import digits

if __name__ == "__main__":
    run_command(digits)
