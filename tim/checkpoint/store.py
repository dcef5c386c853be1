"""Checkpoints that are whole or absent.

A checkpoint `checkpoints/step-0001000/` is written to a temporary folder, flushed to disk, closed with a manifest of
sizes and sha256, read back against it, and renamed into place. Old ones go only after that. Folders of any other name,
copies such as `step-0001000-best`, and links belong to the user: nothing here looks at them.
"""

import itertools
import json
import os
import re
import shutil
import warnings
from collections import ChainMap
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from tim.checkpoint.formats import Snapshot, read_into, tensor_files, write_snapshot
from tim.distributed import on_all_ranks, on_first_rank
from tim.files import flush, naming, read_json, settle, sha256, write_json, write_text
from tim.typed_yaml import NotNegative, convert

MANIFEST = "manifest.json"


class Saver:
    """Does one piece of writing after the other, at once or in a thread while training goes on.

    Args:
        background: write in a thread; otherwise `submit` returns when the work is done.
    """

    def __init__(self, background: bool) -> None:
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint") if background else None
        self.pending: Future[None] | None = None

    def submit(self, write: Callable[[], None]) -> None:
        """Wait for the piece before, then do this one. What it reads must not change until `wait` returns.

        Raises:
            Exception: whatever the piece before (in a thread) or this one (at once) raised.
        """
        self.wait()
        if self.pool is None:
            write()
        else:
            self.pending = self.pool.submit(write)

    def wait(self) -> None:
        """Return when everything submitted is done; raises its error."""
        pending, self.pending = self.pending, None
        if pending is not None:
            pending.result()


def write_checkpoint(
    root: Path, step: int, snapshot: Snapshot, state: dict[str, Any], group: dist.ProcessGroup | None = None
) -> Path:
    """Write a snapshot to `root/step-N`. Collective over `group`, on the CPU alone, so that it may run in a thread.

    Args:
        state: what else the run needs to continue, JSON values only.
        group: of `cpu_group`, used by nothing else meanwhile.

    Raises:
        OSError: when a rank could not write, or the files read back damaged; on all ranks. Nothing is left of them.
    """
    final = root / f"step-{step:07d}"
    partial = root / f".{final.name}.part"
    rank = 0 if group is None else dist.get_rank(group)

    def prepare() -> None:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)

    def write() -> dict[str, dict[str, Any]]:
        with naming(final):
            paths = write_snapshot(partial, snapshot, rank, group)
            for path in paths:
                settle(path)
            if rank == 0:
                paths.append(partial / "state.json")
                write_json(paths[-1], {"step": step, **state})
        return {p.name: {"bytes": p.stat().st_size, "sha256": sha256(p)} for p in paths}

    try:
        on_first_rank(group, prepare)
        written = on_all_ranks(group, write)
        on_first_rank(group, lambda: _put_in_place(partial, final, dict(ChainMap(*written))))
    except Exception:
        if rank == 0:
            shutil.rmtree(partial, ignore_errors=True)  # room for whatever comes next
        raise
    return final


def load_checkpoint(
    path: Path,
    modules: dict[str, nn.Module],
    optimizer: torch.optim.Optimizer,
    group: dist.ProcessGroup | None = None,
    verified: bool = False,
) -> dict[str, Any]:
    """Load a checkpoint of either format in place, on any number of processes, and return its `state`. Collective.

    Args:
        modules: see `tim.checkpoint.formats.take_snapshot`.
        verified: `find_corruption` has been asked already.

    Raises:
        ValueError: when a file is damaged or belongs to another network.
    """
    problem = None if verified else on_first_rank(group, lambda: find_corruption(path))
    if problem:
        raise ValueError(f"checkpoint {path} is damaged: {problem}")
    read_into(path, modules, optimizer, group)
    return read_state(path)


def is_checkpoint(path: Path) -> bool:
    """Whether a folder is a checkpoint, be it damaged."""
    return (path / "state.json").is_file() or (path / MANIFEST).is_file()


def find_corruption(path: Path) -> str | None:
    """Why a checkpoint cannot be used; None when its manifest names all that it needs, with the sizes and sha256 they have."""
    try:
        manifest = read_json(path / MANIFEST)
        files = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"no readable {MANIFEST}"

    def check(name: str) -> str | None:
        size, digest = files[name]
        try:
            if not (path / name).is_file():
                return f"{name} is missing"
            if (path / name).stat().st_size != size:
                return f"{name} has {(path / name).stat().st_size} bytes instead of {size}"
            return None if sha256(path / name) == digest else f"{name} differs from its sha256"
        except (OSError, ValueError) as error:  # a disk that fails, a name that is none
            return f"{name} cannot be read: {error}"

    with ThreadPoolExecutor(8) as pool:  # hashing lets go of the interpreter
        problem = next((problem for problem in pool.map(check, files) if problem), None)
    if problem:
        return problem
    if "state.json" not in files:
        return f"{MANIFEST} does not name state.json"
    try:
        modules = read_state(path).get("modules", ["model"])  # version 0.1 did not say
        unlisted = tensor_files(path, modules) - files.keys()
    except Exception as error:  # of the kinds that unpickling knows: whole files that are not from here
        return f"it is not from here: {error}"
    return f"{MANIFEST} does not name {min(unlisted)}" if unlisted else None


def read_state(path: Path) -> dict[str, Any]:
    """What a checkpoint's state.json says. ValueError when it is not from here."""
    try:
        state = read_json(path / "state.json")
        return {**state, "step": convert(state["step"], NotNegative, "step")}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path / 'state.json'} does not say the state of a run: {error}") from error


def list_checkpoints(root: Path) -> list[Path]:
    """Finished checkpoints, oldest first: folders called `step-` and a number, that of their step, in its order."""
    found = [p for p in root.glob("step-*") if re.fullmatch("step-[0-9]+", p.name) and p.is_dir() and not p.is_symlink()]
    return sorted((p for p in found if not _is_renamed(p)), key=step_of)


def _is_renamed(checkpoint: Path) -> bool:
    """Whether a checkpoint is known to be of another step than its name says."""
    try:
        return read_state(checkpoint)["step"] != step_of(checkpoint)
    except (OSError, ValueError):  # damaged
        return False


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint's name says."""
    return int(checkpoint.name.removeprefix("step-"))


def latest_checkpoint(root: Path) -> Path | None:
    """The newest undamaged checkpoint; warns about damaged ones it passes over."""
    for path in reversed(list_checkpoints(root)):
        problem = find_corruption(path)
        if problem is None:
            return path
        warnings.warn(f"passing over damaged checkpoint {path}: {problem}", stacklevel=2)
    return None


def tidy_checkpoints(root: Path) -> None:
    """Clear what an interrupted save left: half-written folders go, a checkpoint that was being replaced comes back."""
    for folder in root.glob(".step-*"):
        match = re.fullmatch(r"\.(step-[0-9]+)\.(old|part)", folder.name)
        if match is None or folder.is_symlink() or not folder.is_dir():
            continue
        if match[2] == "old" and not (root / match[1]).exists():
            folder.rename(root / match[1])
        else:
            shutil.rmtree(folder)


def prune_checkpoints(root: Path, limit: int | None, keep_steps: list[int]) -> None:
    """Keep the newest `limit` undamaged checkpoints and those of `keep_steps`, which do not count; delete older ones.

    Nothing is deleted before `limit` newer ones have been read and found undamaged.
    """
    candidates = [p for p in list_checkpoints(root) if step_of(p) not in keep_steps]
    if limit is None or len(candidates) <= max(1, limit):
        return
    good = 0
    while candidates and good < max(1, limit):
        good += find_corruption(candidates.pop()) is None
    if good == max(1, limit):
        for path in candidates:
            shutil.rmtree(path)


def _put_in_place(partial: Path, final: Path, files: dict[str, dict[str, Any]]) -> None:
    """Manifest, validation, rename; a checkpoint of the same step is moved aside until the new one stands."""
    # It ends with the brace, not a newline: whatever is cut off shows.
    write_text(partial / MANIFEST, json.dumps(dict(sorted(files.items())), indent=1))
    problem = find_corruption(partial)
    if problem:
        raise OSError(f"{partial} was written but cannot be read back: {problem}; check the disk, and that all nodes share it")
    # A folder cannot be replaced in one move. Killed between the two, `tidy_checkpoints` brings the old one back.
    aside = final.with_name(f".{final.name}.old")
    if os.path.lexists(final) and final not in list_checkpoints(final.parent):  # the user's
        kept = next(p for n in itertools.count(1) if not os.path.lexists(p := final.with_name(f"{final.name} ({n})")))
        warnings.warn(f"{final} is no checkpoint of its step and becomes {kept.name}", stacklevel=2)
        final.rename(kept)
    if final.exists():
        shutil.rmtree(aside, ignore_errors=True)
        final.rename(aside)
    partial.rename(final)
    flush(final.parent)
    shutil.rmtree(aside, ignore_errors=True)
