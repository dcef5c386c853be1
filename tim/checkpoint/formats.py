"""The tensors of a checkpoint: from a run to files and back, for plain, DDP and FSDP2 modules alike.

`full` is model.safetensors, ema.safetensors and optimizer.pt, gathered and written by rank 0; `sharded` is
torch.distributed.checkpoint's format, every rank writing its own part. Both can be read by any number of processes.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from tim.distributed import is_sharded as is_fsdp
from tim.models.loading import check_state, read_state_dict

SHARDED = ".metadata"  # the file by which a sharded checkpoint is known


@dataclass
class Snapshot:
    """The state of a run in CPU memory.

    Attributes:
        parts: "model", "ema" (unless there is none) and "optimizer". Format `full`: everything on rank 0, nothing elsewhere.
        scaler: state of the fp16 gradient scaler.
    """

    parts: dict[str, dict[str, Any]]
    scaler: dict[str, Any] | None
    sharded: bool


def take_snapshot(
    network: nn.Module,
    ema: nn.Module | None,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler | None = None,
    sharded: bool = False,
    stager: BlockingAsyncStager | None = None,
) -> Snapshot:
    """Copy the state to the CPU. Collective.

    Args:
        stager: of `build_stager`; makes copies that share no memory with the run, so that it can go on while they are
            written. They are good until the next snapshot.
    """
    gathered = not sharded and is_fsdp(network)  # through the CPU: no GPU has room for the whole state
    options = StateDictOptions(full_state_dict=not sharded, cpu_offload=gathered or stager is None)
    parts = {"model": get_model_state_dict(network, options=options)}
    if ema is not None:
        parts["ema"] = get_model_state_dict(ema, options=options)
    parts["optimizer"] = get_optimizer_state_dict(network, optimizer, options=options)
    if stager is not None:
        if not sharded and dist.is_initialized() and dist.get_rank() != 0:
            parts = {name: {} for name in parts}
        known = stager.state_dict_cache
        if known and known["optimizer"].get("state", {}).keys() != parts["optimizer"].get("state", {}).keys():
            stager.state_dict_cache = None  # a parameter got its first gradient
        parts = stager.stage(parts)
    return Snapshot(parts, scaler.state_dict() if scaler else None, sharded)


def build_stager(device: torch.device) -> BlockingAsyncStager:
    """Makes the copies of asynchronous checkpoints; beside a GPU it keeps their memory, page-locked, which copies fastest."""
    return BlockingAsyncStager(cache_staged_state_dict=device.type == "cuda")


def write_full(folder: Path, snapshot: Snapshot, rank: int) -> list[Path]:
    """Write the files of the full format on rank 0; returns what this rank wrote."""
    if rank != 0:
        return []
    paths = []
    for name in ("model", "ema"):
        if name in snapshot.parts:
            paths.append(folder / f"{name}.safetensors")
            save_file({k: v.detach().contiguous() for k, v in snapshot.parts[name].items()}, paths[-1])
    paths.append(folder / "optimizer.pt")
    torch.save(snapshot.parts["optimizer"], paths[-1])
    return paths


def write_sharded(folder: Path, snapshot: Snapshot, rank: int, group: dist.ProcessGroup | None) -> list[Path]:
    """Write this rank's part of the sharded format; returns what this rank wrote. Collective over `group`."""
    with _alone_if(group is None):
        dcp.save(snapshot.parts, checkpoint_id=folder, process_group=group)
    return [*sorted(folder.glob(f"__{rank}_*")), *([folder / SHARDED] if rank == 0 else [])]


def read_into(
    path: Path,
    network: nn.Module,
    ema: nn.Module | None,
    optimizer: torch.optim.Optimizer,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Load weights, EMA and optimiser of a checkpoint of either format in place. Collective.

    Raises:
        ValueError: when it belongs to another network, has no EMA or has an older layout.
    """
    modules = {"model": network} if ema is None else {"model": network, "ema": ema}
    sharded = is_sharded(path)
    for name, module in modules.items():
        source = path if sharded else path / f"{name}.safetensors"
        check_state(module, stored_weights(path, name), source)
    if sharded:
        parts = {name: get_model_state_dict(module) for name, module in modules.items()}
        parts["optimizer"] = _stored_part(path, get_optimizer_state_dict(network, optimizer))
        with _alone_if(group is None):
            dcp.load(parts, checkpoint_id=path, process_group=group)
    else:
        parts = {name: checkpoint_weights(path, name) for name in modules}
        parts["optimizer"] = torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True, mmap=True)
        if "param_groups" not in parts["optimizer"]:
            raise ValueError(
                f"{path / 'optimizer.pt'} is of an older layout; start a new project from its weights: model.ckpt={path}"
            )
    for name, module in modules.items():
        set_model_state_dict(module, parts[name], options=StateDictOptions(full_state_dict=not sharded))
    # Parameters that never had a gradient have no moments: none are asked for, and those that torch makes up go again.
    moments = parts["optimizer"]["state"].keys()
    options = StateDictOptions(full_state_dict=not sharded, strict=False)
    set_optimizer_state_dict(network, optimizer, parts["optimizer"], options=options)
    for name, parameter in network.named_parameters():
        if name not in moments:
            optimizer.state.pop(parameter, None)


def checkpoint_weights(path: Path, name: str) -> dict[str, Tensor]:
    """All weights of a checkpoint of either format on the CPU, read by this process alone.

    Args:
        name: 'model' or 'ema'.

    Raises:
        ValueError: when the checkpoint has no such weights.
    """
    stored = stored_weights(path, name)
    if not is_sharded(path):
        return stored
    state = {f"{name}.{k}": torch.empty_like(v, device="cpu") for k, v in stored.items()}
    with _alone_if(True):
        dcp.load(state, checkpoint_id=path)
    return {k.removeprefix(f"{name}."): v for k, v in state.items()}


def stored_weights(path: Path, name: str) -> dict[str, Tensor]:
    """The weights of a full checkpoint, or tensors without memory in the shapes of a sharded one; see checkpoint_weights."""
    if is_sharded(path):
        entries = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
        found = {k: v for k, v in entries.items() if k.startswith(f"{name}.") and isinstance(v, TensorStorageMetadata)}
        state = {
            k.removeprefix(f"{name}."): torch.empty(v.size, dtype=v.properties.dtype, device="meta") for k, v in found.items()
        }
    else:
        file = path / f"{name}.safetensors"
        state = read_state_dict(file) if name == "model" or file.is_file() else {}
    if not state:
        raise ValueError(f"checkpoint {path} has no {name.upper()} weights; set model.use_ema=false to go on without")
    return state


def is_sharded(path: Path) -> bool:
    """Whether a checkpoint folder is of the sharded format."""
    return (path / SHARDED).is_file()


def _stored_part(path: Path, optimizer_state: dict[str, Any]) -> dict[str, Any]:
    """The state dict of an optimiser without the moments that a sharded checkpoint does not have."""
    stored = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    moments = {
        name: values
        for name, values in optimizer_state["state"].items()
        if all(f"optimizer.state.{name}.{key}" in stored for key in values)
    }
    return {**optimizer_state, "state": moments}


@contextmanager
def _alone_if(single: bool) -> Iterator[None]:
    """Without torch's note that no process group was given, when none is meant to be."""
    with warnings.catch_warnings():
        if single:
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
