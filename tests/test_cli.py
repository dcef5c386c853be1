"""What all command lines share."""

import contextlib
import os
import pkgutil
import re
import shlex
import subprocess
import sys

import psutil
import pytest
from helpers.paths import ROOT
from torch import OutOfMemoryError
from torch.utils.data import DataLoader, Dataset

from tim import cli
from tim.cli import command_parser, run_command

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


KILLED = "a process that reads data was killed: too little memory, or /dev/shm is too small; take fewer num_workers"
PEER = "another process of this run has ended; its own message says why"


@pytest.mark.parametrize(
    "error,code,words",
    [
        (OSError(28, "No space left on device", "a/b.png"), 2, "error: a/b.png: No space left on device\n"),
        (OSError("a/b is damaged"), 2, "error: a/b is damaged\n"),
        (PermissionError(13, "Permission denied", b"a"), 2, "error: a: Permission denied\n"),
        (ValueError(), 2, "error: ValueError\n"),
        (MemoryError(), 2, "error: MemoryError; take smaller batches\n"),
        (OutOfMemoryError("CUDA out of memory.\nlater"), 2, "error: CUDA out of memory.; take smaller batches\n"),
        (
            RuntimeError("[pair.cc:547] Connection closed by peer [::1]:9"),
            2,
            "error: another process of this run has ended; its own message says why\n",
        ),
        (RuntimeError("DataLoader worker (pid 9) is killed by signal: Bus error."), 2, f"error: {KILLED}\n"),
        (KeyboardInterrupt(), 130, "interrupted; run the same command again to continue\n"),
    ],
)
def test_what_is_not_a_fault_of_the_program_is_one_line(error, code, words, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as stop:
        run_command(main)
    assert stop.value.code == code and capsys.readouterr().err == words


def test_a_workers_error_is_its_last_line(capsys):
    class Broken(Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, index):
            raise ValueError(f"sample {index} cannot be read: no image")

    with pytest.raises(SystemExit):
        run_command(lambda: list(DataLoader(Broken(), num_workers=1)))
    assert capsys.readouterr().err == "error: sample 0 cannot be read: no image\n"


def test_output_that_nobody_reads_ends_a_command_quietly():
    script = "from tim.cli import run_command; run_command(lambda: [print('line', flush=True) for _ in range(100000)])"
    done = subprocess.run(
        f"{sys.executable} -c {shlex.quote(script)} | head -n 1; echo ${{PIPESTATUS[0]}}",
        shell=True, executable="/bin/bash", cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ("line\n141\n", "")


@pytest.mark.skipif(sys.platform != "linux", reason="parents are watched by Linux alone")
@pytest.mark.parametrize("launcher,left", [("torchrun", False), ("my_script", True)])
def test_processes_end_with_a_launcher_that_is_killed(tmp_path, launcher, left):
    """But not with a shell or a script, which people leave behind on purpose."""
    worker = "import time; from tim.cli import run_command; run_command(lambda: (print('begun', flush=True), time.sleep(60)))"
    (tmp_path / launcher).write_text(
        f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {worker!r}]); print(p.pid, flush=True); p.wait()"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = [sys.executable, str(tmp_path / launcher)]
    with subprocess.Popen(words, env=env, stdout=subprocess.PIPE, text=True) as parent:
        lines = sorted(parent.stdout.readline() for _ in range(2))
        parent.kill()
        process = psutil.Process(int(lines[0]))
        with contextlib.suppress(psutil.TimeoutExpired):
            process.wait(0.5 if left else 30)
        assert process.is_running() is left
        if left:
            process.kill()


def test_commands_that_need_no_torch_do_not_import_it():
    script = "import sys; from tim.cli import run_command; run_command(lambda: None); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)


HELP = """
import contextlib, io, runpy, sys

for path in sys.argv[1:]:
    sys.argv = [path, "--help"]
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            runpy.run_path(path, run_name="__main__")
    except SystemExit as stop:
        assert stop.code == 0, path
    assert "torch" not in sys.modules, path
    print(said.getvalue())
    reads_configs = any(flag in said.getvalue() for flag in ("--config ", "--recipes "))
    assert reads_configs == ("--allow-code" in said.getvalue()), path
"""


def test_no_help_waits_for_torch():
    paths = [p for folder in ("projects", "tools") for p in sorted((ROOT / folder).rglob("*.py"))]
    done = subprocess.run([sys.executable, "-c", HELP, *map(str, paths)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage: ") == len(paths) > 20


def test_help_shows_groups_and_the_defaults_that_say_something():
    parser = command_parser("First line.\n\nSecond line.")
    group = parser.add_argument_group("sizes")
    group.add_argument("--seed", type=int, default=0, help="of the noise")
    group.add_argument("--out", help="the file")
    group.add_argument("--fast", action="store_true", help="less exact")
    group.add_argument("--tf32", action="store_false", help="kept")
    group.add_argument("--side", default=8, help="pixels (default: the image's)")
    words = " ".join(parser.format_help().split())
    assert (
        "First line. Second line." in words
        and "sizes: --seed SEED of the noise (default: 0) --out OUT the file --fast" in words
    )
    assert words.endswith("less exact --tf32 kept (default: True) --side SIDE pixels (default: the image's)")


LOG = """
import logging, warnings
from tim.cli import run_command

def main():
    for level in ("debug", "info", "warning"):
        getattr(logging.getLogger("tim.room"), level)(f"a {level}")
    print("a result")

logging.basicConfig()  # as some libraries do
run_command(main)
"""


@pytest.mark.parametrize(
    ("rank", "level", "lines"),
    [
        (None, None, ["INFO a info", "WARNING a warning"]),
        ("0", "debug", ["DEBUG a debug", "INFO a info", "WARNING a warning"]),
        ("3", None, ["WARNING rank 3: a warning"]),
        ("3", "INFO", ["INFO rank 3: a info", "WARNING rank 3: a warning"]),
    ],
)
def test_the_log_has_times_and_levels_and_leaves_stdout_to_results(rank, level, lines):
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "TIM_LOG_LEVEL")}
    env.update({k: v for k, v in (("RANK", rank), ("TIM_LOG_LEVEL", level)) if v})
    done = subprocess.run([sys.executable, "-c", LOG], cwd=ROOT, capture_output=True, text=True, env=env)
    assert done.stdout == "a result\n"
    times, told = zip(*(line.split(" ", 1) for line in done.stderr.splitlines()), strict=True)
    assert list(told) == lines and all(re.fullmatch(r"\d\d:\d\d:\d\d", t) for t in times)


def test_an_unknown_log_level_is_named(monkeypatch, capsys):
    monkeypatch.setenv("TIM_LOG_LEVEL", "loud")
    with pytest.raises(SystemExit):
        run_command(lambda: None)
    assert capsys.readouterr().err == "error: TIM_LOG_LEVEL='LOUD' is not one of DEBUG, INFO, WARNING, ERROR\n"


def test_console_scripts_name_their_commands(monkeypatch, capsys):
    for entry, program, commands in ((cli.train, "tim-train", cli.TRAIN), (cli.sample, "tim-sample", cli.SAMPLE)):
        monkeypatch.setattr(sys, "argv", [program, "--help"])
        with pytest.raises(SystemExit):
            entry()
        text = capsys.readouterr().out
        assert all(f"    {name} " in text for name in commands)
    monkeypatch.setattr(sys, "argv", ["tim-train", "c2i", "--help"])
    with pytest.raises(SystemExit):
        cli.train()
    assert capsys.readouterr().out.startswith("usage: tim-train c2i [-h] --config FILE")


# libraries behind these console scripts are still to be written


@pytest.mark.parametrize("table", ["TRAIN", "SAMPLE", "EVALUATE"])
def test_every_command_of_the_console_scripts_exists(table):
    for target, _ in getattr(cli, table).values():
        assert callable(pkgutil.resolve_name(target))
