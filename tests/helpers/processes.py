"""Training runs in processes of their own, one or several ranks, forked from a server that has done the imports."""

import hashlib
import json
import multiprocessing
import os
import runpy
import signal
import socket
import sys
from pathlib import Path

import torch

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "tim.training.loop", "tim.models.c2i.tim_model", "tim.models.t2i.tim_model", "matplotlib.figure",
        "tim.generation.engine", "tim.evaluation.adm", "tim.evaluation.extract", "timm", "torchvision", "pytest", "peft",
    ]
)  # fmt: skip


def run(function, *args, ranks: int = 1, log: Path, errors: Path | None = None, timeout: float = 180) -> list[int]:
    """Call a module-level function in `ranks` processes; returns their exit codes.

    Args:
        log: gets what they print. errors: gets what they print on stderr, `log` when None.
    """
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    processes = [
        CONTEXT.Process(target=_enter, args=(rank, ranks, port, (log, errors or log), function, args)) for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
    return [process.exitcode for process in processes]


def _enter(rank, ranks, port, logs, function, args) -> None:
    if ranks > 1:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        os.environ.update({k: str(v) for k, v in place.items()}, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    for descriptor, log in zip((1, 2), logs, strict=True):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    function(*args)


def run_script(words: list[str], folder: Path) -> None:
    """Run a script as __main__ from a folder."""
    sys.argv = words
    os.chdir(folder)
    runpy.run_path(words[0], run_name="__main__")


def train(config, project, overrides, task="ClassTask", at=None) -> None:
    """Train as the command does.

    Args:
        at: (step, rank, signals): what this rank sends itself once the step is logged.
    """
    from tim.cli import log_to_stderr
    from tim.config import load_config
    from tim.training import loop, tasks
    from tim.training.logging import RunLogger

    real = RunLogger.log

    def log(self, step, values):
        real(self, step, values)
        if at is not None and step == at[0] and int(os.environ.get("RANK", 0)) == at[1]:
            for number in at[2]:
                os.kill(os.getpid(), number)

    RunLogger.log = log
    with log_to_stderr():
        loop.train(load_config(config, overrides), project, 1, getattr(tasks, task))


def killed_at(step) -> tuple:
    """`at` of a process that is killed as soon as this step is logged."""
    return (step, 0, [signal.SIGKILL])


def log_of(project) -> list[dict]:
    """Records of log.jsonl."""
    return [json.loads(line) for line in (project / "log.jsonl").read_text().splitlines()]


def losses(project) -> list[float]:
    """Logged denoising losses."""
    return [record["denoising_loss"] for record in log_of(project)]


def state_of(project, step) -> dict:
    """Everything a full checkpoint holds, as comparable values: tensors by the sha256 of their bits."""
    from safetensors.torch import load_file

    folder = project / "checkpoints" / f"step-{step:07d}"
    optimizer = torch.load(folder / "optimizer.pt", weights_only=True)
    tensors = {f"{n}.{k}": v for n in ("model", "ema") for k, v in load_file(folder / f"{n}.safetensors").items()}
    tensors |= {f"{name}.{k}": v for name, moments in optimizer["state"].items() for k, v in moments.items()}
    return {
        "tensors": {k: (str(v.dtype), hashlib.sha256(v.numpy().tobytes()).hexdigest()) for k, v in tensors.items()},
        "groups": json.loads(json.dumps(optimizer["param_groups"])),
        "state": json.loads((folder / "state.json").read_text()),
    }
