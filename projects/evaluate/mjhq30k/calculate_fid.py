"""FID of MJHQ-30K: calculate_fid.py REF DIR, or calculate_fid.py REF OUT.npz --save-stats"""

from tim.cli import run_command
from tim.evaluation.commands import mjhq_fid

if __name__ == "__main__":
    run_command(mjhq_fid)
