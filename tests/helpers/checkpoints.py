"""Checkpoints without a trainer."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from tim.checkpoint.formats import take_snapshot
from tim.checkpoint.store import write_checkpoint


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
    return write_checkpoint(root, step, take_snapshot(network, ema, optimizer, sharded), state)
