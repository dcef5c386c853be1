"""Score DPG-Bench's images: compute_dpg_bench.py --image-root-path DIR --res-path F.txt"""

from tim.cli import run_command
from tim.evaluation.commands import dpg

if __name__ == "__main__":
    run_command(dpg)
