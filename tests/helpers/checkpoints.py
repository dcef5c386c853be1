"""Checkpoints without a trainer."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from tim.checkpoint.formats import take_snapshot
from tim.checkpoint.store import load_checkpoint, write_checkpoint


def modules_of(network: nn.Module, ema: nn.Module | None) -> dict[str, nn.Module]:
    """What a checkpoint calls them."""
    return {"model": network} | ({} if ema is None else {"ema": ema})


def save_checkpoint(
    root: Path,
    step: int,
    network: nn.Module,
    ema: nn.Module | None,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    sharded: bool = False,
) -> Path:
    """Write `root/step-N` as a single process does."""
    return write_checkpoint(root, step, take_snapshot(modules_of(network, ema), optimizer, sharded), state)


def load(path: Path, network: nn.Module, ema: nn.Module | None, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Load a checkpoint in place as a single process does."""
    return load_checkpoint(path, modules_of(network, ema), optimizer)
