"""FID, sFID, inception score, precision and recall as ADM measures them: adm_evaluator.py REF SAMPLES"""

from tim.cli import run_command
from tim.evaluation.commands import adm

if __name__ == "__main__":
    run_command(adm)
