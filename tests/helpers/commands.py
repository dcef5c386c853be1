"""Running the project's commands: inside this process, in several, or to be killed."""

import contextlib
import io
import os
import resource
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from helpers.paths import ROOT
from helpers.processes import run, run_script


def command(*args: object, processes: int = 1, check: bool = True, folder: Path = ROOT) -> subprocess.CompletedProcess:
    """Run a project entry point: inside this process, or in several as torchrun starts them, but without its imports.

    Args:
        folder: where it runs.
    """
    words = list(map(str, args))
    if processes > 1:
        with tempfile.TemporaryDirectory() as place:
            out, errors = Path(place) / "out", Path(place) / "errors"
            codes = run(run_script, words, folder, ranks=processes, log=out, errors=errors)
            printed = (path.read_text(encoding="utf-8") for path in (out, errors))
            done = subprocess.CompletedProcess(words, int(any(codes)), *printed)
    else:
        done = run_inside(words, folder)
    if check and done.returncode:
        raise AssertionError(f"{args} ended with {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}")
    return done


def start_and_kill(words: list, ready: Callable[[], bool]) -> None:
    """Start a command in a process of its own and kill -9 it as soon as `ready`; it must not have ended before."""
    process = subprocess.Popen(
        [sys.executable, *map(str, words)], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.time() + 120
    while time.time() < deadline and process.poll() is None and not ready():
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run was over before it could be killed"


def logged_steps(project: Path) -> int:
    """Lines of a training run's log.jsonl."""
    log = project / "log.jsonl"
    return len(log.read_text().splitlines()) if log.is_file() else 0


def run_inside(words: list[str], folder: Path = ROOT) -> subprocess.CompletedProcess:
    """Run a script as __main__ in this process, from a folder, and catch what it prints and returns."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    argv, before = sys.argv, os.getcwd()
    sys.argv = words
    os.chdir(folder)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            runpy.run_path(str(ROOT / words[0]), run_name="__main__")
    except SystemExit as stop:
        code = stop.code or 0
    finally:
        sys.argv = argv
        os.chdir(before)
        reset_accelerate()
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())


@contextlib.contextmanager
def small_disk(limit: int) -> Iterator[None]:
    """Let no file grow beyond `limit` bytes, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def reset_accelerate() -> None:
    """Forget the mixed precision of the last Accelerator."""
    if "accelerate" in sys.modules:
        sys.modules["accelerate"].state.AcceleratorState._reset_state(True)
