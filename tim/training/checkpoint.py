"""Checkpoints that are whole or absent.

A checkpoint `checkpoints/step-0001000/` is written to a temporary folder, flushed to disk, closed with a manifest of
sizes and sha256, and renamed into place. Old ones go only after the new one stands.
"""

import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from tim.models.loading import load_strict, read_state_dict, sha256

MANIFEST = "manifest.json"


def save_checkpoint(
    root: Path,
    step: int,
    network: nn.Module,
    ema: nn.Module | None,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    scaler: Any = None,
) -> Path:
    """Write `root/step-N` with model.safetensors, ema.safetensors, optimizer.pt and state.json.

    Args:
        state: what else the run needs to continue, JSON values only.
        scaler: the fp16 gradient scaler, when there is one.
    """
    final = root / f"step-{step:07d}"
    partial = root / f".{final.name}.part"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file(_tensors(network), partial / "model.safetensors")
    if ema is not None:
        save_file(_tensors(ema), partial / "ema.safetensors")
    torch.save(
        {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict() if scaler else None}, partial / "optimizer.pt"
    )
    (partial / "state.json").write_text(json.dumps({"step": step, **state}, indent=1))
    files = {p.name: {"bytes": p.stat().st_size, "sha256": sha256(p)} for p in sorted(partial.iterdir())}
    (partial / MANIFEST).write_text(json.dumps(files, indent=1))
    for path in partial.iterdir():
        _flush(path)
    if final.exists():
        shutil.rmtree(final)
    partial.rename(final)
    _flush(root)
    return final


def load_checkpoint(
    path: Path, network: nn.Module, ema: nn.Module | None, optimizer: torch.optim.Optimizer, scaler: Any = None
) -> dict[str, Any]:
    """Load a checkpoint in place and return its `state`.

    Raises:
        ValueError: when a file is damaged or belongs to another network.
    """
    problem = damage(path)
    if problem:
        raise ValueError(f"checkpoint {path} is damaged: {problem}")
    load_strict(network, read_state_dict(path / "model.safetensors"), path / "model.safetensors")
    if ema is not None:
        if not (path / "ema.safetensors").is_file():
            raise ValueError(f"checkpoint {path} has no EMA weights; set model.use_ema=false to go on without")
        load_strict(ema, read_state_dict(path / "ema.safetensors"), path / "ema.safetensors")
    extra = torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True)
    optimizer.load_state_dict(extra["optimizer"])
    if scaler is not None and extra["scaler"]:
        scaler.load_state_dict(extra["scaler"])
    return json.loads((path / "state.json").read_text())


def damage(path: Path) -> str | None:
    """Why a checkpoint cannot be used, or None when every file has the size and sha256 of the manifest."""
    try:
        files = json.loads((path / MANIFEST).read_text())
    except (OSError, json.JSONDecodeError):
        return f"no readable {MANIFEST}"
    for name, entry in files.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != entry["bytes"]:
            return f"{name} has {file.stat().st_size} bytes instead of {entry['bytes']}"
        if sha256(file) != entry["sha256"]:
            return f"{name} differs from its sha256"
    return None


def list_checkpoints(root: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    return sorted(p for p in root.glob("step-*") if p.is_dir()) if root.is_dir() else []


def latest_checkpoint(root: Path) -> Path | None:
    """The newest undamaged checkpoint; warns about damaged ones it passes over."""
    for path in reversed(list_checkpoints(root)):
        problem = damage(path)
        if problem is None:
            return path
        warnings.warn(f"passing over damaged checkpoint {path}: {problem}", stacklevel=2)
    return None


def prune_checkpoints(root: Path, limit: int | None, keep_steps: list[int]) -> None:
    """Delete the oldest checkpoints beyond `limit`; those of `keep_steps` stay and do not count."""
    if limit is None:
        return
    names = {f"step-{step:07d}" for step in keep_steps}
    candidates = [p for p in list_checkpoints(root) if p.name not in names]
    for path in candidates[: max(0, len(candidates) - max(1, limit))]:
        shutil.rmtree(path)


def _tensors(network: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.detach().contiguous().cpu() for k, v in network.state_dict().items()}


def _flush(path: Path) -> None:
    """fsync a file or folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
