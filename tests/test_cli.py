"""What all command lines share."""

import subprocess
import sys

import pytest
from helpers.paths import ROOT

ENDS = {
    "return": ("pass", 0, ""),
    "mistake": ("raise ValueError('steps=0 is too few')", 2, "error: steps=0 is too few"),
    "signal": ("raise SystemExit(75)", 75, ""),
    "fault": ("raise RuntimeError('a fault')", 1, "RuntimeError: a fault"),
}


@pytest.mark.parametrize("end", ENDS)
def test_a_command_leaves_the_process_group_however_it_ends(end, tmp_path):
    """Threads of gloo that outlive Python abort a command that has done its work, once in some fifty runs."""
    body, code, error = ENDS[end]
    script = f"""
import atexit, torch.distributed as dist
from tim.cli import run_command

def main():
    dist.init_process_group("gloo", init_method="file://{tmp_path}/store", rank=0, world_size=1)
    {body}

atexit.register(lambda: print("left" if not dist.is_initialized() else "still there"))
run_command(main)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert error in done.stderr
    assert done.stdout == "left\n"


def test_commands_that_need_no_torch_do_not_import_it():
    script = "import sys; from tim.cli import run_command; run_command(lambda: None); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)
