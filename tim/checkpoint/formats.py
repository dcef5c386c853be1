"""The tensors of a checkpoint: from a run to files and back, for plain, DDP and FSDP2 modules alike.

`full` is model.safetensors, ema.safetensors and optimizer.pt, gathered and written by rank 0; `sharded` is
torch.distributed.checkpoint's format, every rank writing its own part. Both can be read by any number of processes.
"""

import inspect
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
from torch.distributed.checkpoint import state_dict as dcp_state
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.staging import BlockingAsyncStager

from tim.checkpoint.sharded import SHARDED, load, read_metadata
from tim.distributed import is_sharded as is_fsdp
from tim.models.loading import check_state, left_out, read_pickled, read_state_dict

warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # said to a single process, which means to be alone


@dataclass
class Snapshot:
    """Network, moving average and optimiser of a run in CPU memory.

    Attributes:
        parts: "model", "ema" (unless there is none) and "optimizer". Format `full`: everything on rank 0, nothing elsewhere.
        sharded: the format; False is `full`.
    """

    parts: dict[str, dict[str, Any]]
    sharded: bool


def take_snapshot(
    modules: dict[str, nn.Module],
    optimizer: torch.optim.Optimizer,
    sharded: bool = False,
    stager: BlockingAsyncStager | None = None,
) -> Snapshot:
    """Copy the state to the CPU. Collective.

    Args:
        modules: the network, plain, DDP's or FSDP2's, as "model", and its moving average, if there is one, as "ema".
        sharded: every rank keeps its own part; otherwise rank 0 gathers everything.
        stager: of `build_stager`; makes copies that share no memory with the run, so that it can go on while they are
            written. They are good until the next snapshot.
    """
    gathered = not sharded and is_fsdp(modules["model"])  # through the CPU: no GPU has room for the whole state
    options = dcp_state.StateDictOptions(full_state_dict=not sharded, cpu_offload=gathered or stager is None)
    parts: dict[str, dict[str, Any]] = {name: dcp_state.get_model_state_dict(m, options=options) for name, m in modules.items()}
    for key in left_out(modules["model"]):  # untrained, often larger than the rest
        for part in parts.values():
            part.pop(key, None)  # where rank 0 gathers, the others have nothing
    parts["optimizer"] = dcp_state.get_optimizer_state_dict(modules["model"], optimizer, options=options)
    if stager is not None:
        if not sharded and dist.is_initialized() and dist.get_rank() != 0:
            parts = {name: {} for name in parts}  # rank 0 writes for all
        known = stager.state_dict_cache
        if known and known["optimizer"].get("state", {}).keys() != parts["optimizer"].get("state", {}).keys():
            stager.state_dict_cache = None  # a parameter got its first gradient
        parts = stager.stage(parts)
    return Snapshot(parts, sharded)


def build_stager(device: torch.device) -> BlockingAsyncStager:
    """Makes the copies of asynchronous checkpoints; beside a GPU it keeps their memory, page-locked, which copies fastest."""
    return BlockingAsyncStager(cache_staged_state_dict=device.type == "cuda")


def write_snapshot(folder: Path, snapshot: Snapshot, rank: int, group: dist.ProcessGroup | None) -> list[Path]:
    """Write this rank's files of a snapshot, and return them. Collective over `group`."""
    if snapshot.sharded:
        with _causes():
            dcp.save(snapshot.parts, checkpoint_id=folder, process_group=group)
        return [*sorted(folder.glob(f"__{rank}_*")), *([folder / SHARDED] if rank == 0 else [])]
    if rank != 0:
        return []
    for name, part in snapshot.parts.items():
        if name == "optimizer":
            torch.save(part, folder / "optimizer.pt")
        else:
            save_file({k: v.detach().contiguous() for k, v in part.items()}, folder / f"{name}.safetensors")
    return sorted(folder.iterdir())  # nobody else writes there


def read_into(
    path: Path, modules: dict[str, nn.Module], optimizer: torch.optim.Optimizer, group: dist.ProcessGroup | None = None
) -> None:
    """Load weights, EMA and optimiser of a checkpoint of either format in place. Collective.

    The optimiser gets its moments and learning rate; whatever else its constructor was given stays as it is.

    Args:
        modules: see `take_snapshot`.

    Raises:
        ValueError: when it belongs to another network, has no EMA or has an older layout.
    """
    network, sharded = modules["model"], is_sharded(path)
    parts: dict[str, dict[str, Any]] = {name: read_weights(path, name, shapes_only=sharded) for name in modules}
    for name, module in modules.items():
        check_state(module, parts[name], path if sharded else path / f"{name}.safetensors")
    fresh = dcp_state.get_optimizer_state_dict(network, optimizer)
    if sharded:
        own = {name: dcp_state.get_model_state_dict(module) for name, module in modules.items()}
        parts = {name: {key: value for key, value in own[name].items() if key in part} for name, part in parts.items()}
        parts["optimizer"] = _stored_part(fresh, _entries(path))
        load(parts, path, group)
    else:
        parts["optimizer"] = read_pickled(path / "optimizer.pt", mmap=True)
        if not isinstance(parts["optimizer"], dict) or "param_groups" not in parts["optimizer"]:
            raise ValueError(
                f"{path / 'optimizer.pt'} is of an older layout; start a new project from its weights: model.ckpt={path}"
            )
    _keep_settings(parts["optimizer"], fresh, optimizer, path)
    put_into(parts, modules, optimizer, full=not sharded)


def put_into(
    parts: dict[str, dict[str, Any]], modules: dict[str, nn.Module], optimizer: torch.optim.Optimizer, full: bool = True
) -> None:
    """Load what was read and checked in place. Collective.

    Args:
        parts: state dicts of `modules`, and of the optimiser by names of parameters; without `param_groups` these stay.
        full: all of everything, instead of this rank's part.
    """
    network = modules["model"]
    options = dcp_state.StateDictOptions(full_state_dict=full, strict=False)  # `check_state` was
    for name, module in modules.items():
        dcp_state.set_model_state_dict(module, parts[name], options=options)
    # Parameters that never had a gradient have no moments: none are asked for, and those that torch makes up go again.
    moments = parts["optimizer"]["state"].keys()
    if "param_groups" not in parts["optimizer"]:
        own = dcp_state.get_optimizer_state_dict(network, optimizer, options=options)
        parts["optimizer"]["param_groups"] = own["param_groups"]
    dcp_state.set_optimizer_state_dict(network, optimizer, parts["optimizer"], options=options)
    for name, parameter in network.named_parameters():
        if name not in moments:
            optimizer.state.pop(parameter, None)


def read_weights(path: Path, name: str, shapes_only: bool = False) -> dict[str, Tensor]:
    """All weights of a checkpoint of either format on the CPU. Collective where processes have a group.

    Args:
        name: 'model' or 'ema'.
        shapes_only: of a sharded checkpoint, tensors without memory.

    Raises:
        ValueError: when the checkpoint has no such weights.
    """
    if not has_weights(path, name):
        raise ValueError(f"checkpoint {path} has no {name.upper()} weights; set model.use_ema=false to go on without")
    if not is_sharded(path):
        return read_state_dict(path / f"{name}.safetensors")
    device = "meta" if shapes_only else "cpu"
    state = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype, device=device)
        for key, entry in _entries(path).items()
        if key.startswith(f"{name}.") and isinstance(entry, TensorStorageMetadata)
    }
    if not shapes_only:
        load(state, path)
    return {key.removeprefix(f"{name}."): value for key, value in state.items()}


def has_weights(path: Path, name: str) -> bool:
    """Whether a checkpoint of either format has weights 'model' or 'ema'."""
    if is_sharded(path):
        return any(key.startswith(f"{name}.") for key in _entries(path))
    return (path / f"{name}.safetensors").is_file()


def is_sharded(path: Path) -> bool:
    """Whether a checkpoint folder is of the sharded format."""
    return (path / SHARDED).is_file()


def tensor_files(path: Path, modules: list[str]) -> set[str]:
    """The files without which a checkpoint of these modules ("model", "ema") is not whole in its format."""
    if not is_sharded(path):
        return {"optimizer.pt", *(f"{name}.safetensors" for name in modules)}
    return {SHARDED, *(place.relative_path for place in read_metadata(path).storage_data.values())}


@contextmanager
def _causes() -> Iterator[None]:
    """Raise what is behind an error of torch.distributed.checkpoint, whose own class is no Exception."""
    try:
        yield
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from error


def _entries(path: Path) -> dict[str, Any]:
    """What a sharded checkpoint holds, by name."""
    return read_metadata(path).state_dict_metadata


def _stored_part(state: dict[str, Any], stored: dict[str, Any]) -> dict[str, Any]:
    """What of the state dict of an optimiser a sharded checkpoint has: not every parameter has moments."""
    moments = {
        name: {key: value for key, value in values.items() if f"optimizer.state.{name}.{key}" in stored}
        for name, values in state["state"].items()
    }
    groups = [
        {key: value for key, value in group.items() if f"optimizer.param_groups.{number}.{key}" in stored}
        for number, group in enumerate(state["param_groups"])
    ]
    return {"state": {name: values for name, values in moments.items() if values}, "param_groups": groups}


def _keep_settings(stored: dict[str, Any], fresh: dict[str, Any], optimizer: torch.optim.Optimizer, path: Path) -> None:
    """Put today's settings into the state dict of an optimiser, all that its constructor takes but the learning rate.

    Raises:
        ValueError: when today's optimiser has other moments.
    """
    for name, moments in stored["state"].items():
        today = fresh["state"].get(name, {}).keys()
        if moments.keys() != today:
            raise ValueError(
                f"{path} has other moments than training.optimizer keeps ({name}: {', '.join(moments)}, now "
                f"{', '.join(today) or 'none'}); start a new project from its weights: model.ckpt={path}"
            )
    settings = inspect.signature(type(optimizer)).parameters.keys() - {"lr"}
    for group, today in zip(stored["param_groups"], fresh["param_groups"], strict=True):
        kept = {key: group[key] for key in group.keys() & today.keys() - settings}  # such as the rate and its schedule's base
        group.clear()
        group.update(today | kept)
