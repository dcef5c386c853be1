"""Kills a save at each of its file-system operations: kill_points.py FOLDER full|sharded now|thread

Every operation is tried in a forked process of its own, on a copy of a project with one good checkpoint, which the save of
the next one would retire. Prints one JSON line per kill: the operation, the checkpoint found afterwards, and whether it
loads with the weights of its step.
"""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import torch
from torch import nn

from tim.checkpoint import formats, store

AUDITED = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.scandir", "shutil.rmtree"}


def build(value: float) -> tuple[dict[str, nn.Module], torch.optim.Optimizer]:
    """Network, average and optimiser with every weight near `value`."""
    network, ema = nn.Linear(6, 5), nn.Linear(6, 5)
    for module in (network, ema):
        for p in module.parameters():
            nn.init.constant_(p, value)
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.0)
    network(torch.ones(1, 6)).sum().backward()
    optimizer.step()
    return {"model": network, "ema": ema}, optimizer


class Killer:
    """Ends this process at the n-th operation under `root`; files of compiled writers are cut in the middle too."""

    def __init__(self, root: Path, target: int) -> None:
        self.root, self.target, self.count = str(root), target, 0
        sys.addaudithook(self.audit)
        os.fsync = self.before(os.fsync, "fsync")
        formats.save_file = self.inside(formats.save_file, lambda tensors, path: path)
        torch.save = self.inside(torch.save, lambda value, path: path)

    def audit(self, event: str, arguments: tuple) -> None:
        if event in AUDITED and self.root in str(arguments[0]):
            self.hit(event)

    def before(self, function, name):
        def wrapped(*arguments):
            self.hit(name)
            return function(*arguments)

        return wrapped

    def inside(self, function, path_of):
        def wrapped(*arguments):
            result = function(*arguments)
            path = path_of(*arguments)
            if str(path).startswith(self.root):
                if self.count + 1 == self.target:
                    os.truncate(path, path.stat().st_size // 2)
                self.hit(f"half of {path.name}")
            return result

        return wrapped

    def hit(self, name: str) -> None:
        self.count += 1
        if self.count == self.target:
            os.write(1, json.dumps({"operation": name}).encode())
            os.kill(os.getpid(), signal.SIGKILL)


def save(root: Path, target: int, sharded: bool, threaded: bool) -> None:
    """Save step 2 and retire step 1, in this process."""
    modules, optimizer = build(2.0)
    saver = store.Saver(threaded)
    stager = formats.build_stager(torch.device("cpu")) if threaded else None
    snapshot = formats.take_snapshot(modules, optimizer, sharded, stager)
    Killer(root, target)

    def write() -> None:
        store.write_checkpoint(root, 2, snapshot, {"seed": 0})
        store.prune_checkpoints(root, 1, [])

    saver.submit(write)
    with torch.no_grad():
        modules["model"].weight.zero_()  # training goes on
    saver.wait()


def examine(root: Path) -> dict:
    """Resume, as a run does."""
    store.tidy_checkpoints(root)
    latest = store.latest_checkpoint(root)
    step = int(latest.name[-7:])
    modules, optimizer = build(0.0)
    state = store.load_checkpoint(latest, modules, optimizer)
    values = {round(p.item()) for module in modules.values() for p in module.parameters() for p in p.flatten()[:1]}
    whole = state == {"step": step, "seed": 0} and values == {step} and not list(root.glob(".*"))
    return {"latest": step, "whole": whole}


def main() -> None:
    folder, sharded, threaded = Path(sys.argv[1]), sys.argv[2] == "sharded", sys.argv[3] == "thread"
    torch.set_num_threads(1)
    good = folder / "good"
    store.write_checkpoint(good, 1, formats.take_snapshot(*build(1.0), sharded), {"seed": 0})
    for target in range(1, 1000):
        root = folder / str(target)
        shutil.copytree(good, root)
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.dup2(write, 1)
            save(root, target, sharded, threaded)
            os._exit(0)
        os.close(write)
        status = os.waitpid(child, 0)[1]
        said = os.read(read, 1000)
        os.close(read)
        ended = status == 0
        print(json.dumps({**(json.loads(said) if said else {}), **examine(root), "ended": ended}), flush=True)
        if ended:
            return
        assert status == signal.SIGKILL, status


if __name__ == "__main__":
    main()
