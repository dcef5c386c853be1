"""Measure prompt following of a small text-to-image model: evaluate_t2i_demo.py JUDGE --config YAML --samples DIR --out DIR"""

from tim.cli import run_command
from tim.demo.commands import t2i

if __name__ == "__main__":
    run_command(t2i)
