"""The processes of a run, the device each runs on, and how it multiplies."""

import os
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule

T = TypeVar("T")
GROUP_TIMEOUT = timedelta(hours=2)  # the longest that one rank may have to write after another is done


def use_cpu() -> bool:
    """Whether accelerate must be told to use the CPU (gloo between processes): several processes and no CUDA device."""
    return not torch.cuda.is_available() and int(os.environ.get("WORLD_SIZE", 1)) > 1


def best_device() -> torch.device:
    """The device accelerate would choose."""
    return PartialState(cpu=use_cpu()).device


HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}  # names of mixed precision


def inference_dtype(mixed_precision: str, device: torch.device) -> torch.dtype:
    """dtype of a model that is not trained: the mixed precision's on a GPU, float32 on a CPU."""
    return HALF.get(mixed_precision, torch.float32) if device.type == "cuda" else torch.float32


def to_device(x: Tensor, device: torch.device | str) -> Tensor:
    """A tensor of the host on a device; a GPU takes it when it gets there, without anybody waiting."""
    # From memory that is not pinned, the copy would wait for all that was launched before it.
    return x.pin_memory().to(device, non_blocking=True) if torch.device(device).type == "cuda" else x.to(device)


def set_tf32(allowed: bool) -> None:
    """Allow TF32 in float32 products on CUDA."""
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


def leave_process_group(failed: bool = False) -> None:
    """End communication while Python is still whole; the last thing a command does.

    Left to the end of the interpreter, gloo's threads may drop their last tensors when Python no longer runs and abort the
    process (SIGABRT after all work is done).

    Args:
        failed: the other processes may be in the middle of a collective. NCCL would wait for it and keep this process from
            ending, so its group is left to the end of the process.
    """
    if dist.is_available() and dist.is_initialized() and not (failed and dist.get_backend() == "nccl"):
        dist.destroy_process_group()


def cpu_group() -> dist.ProcessGroup | None:
    """A gloo group of all processes, None for a single one. Collective."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return None
    group = dist.new_group(backend="gloo", timeout=GROUP_TIMEOUT)
    assert isinstance(group, dist.ProcessGroup)  # every process is a member
    return group


def on_all_ranks(group: dist.ProcessGroup | None, action: Callable[[], Any]) -> list[Any]:
    """Run `action`, exchange the results; waits for the slowest rank. An error of one rank is raised on all.

    Raises:
        Exception: whatever `action` raised; on the other ranks an OSError, a ValueError or else a RuntimeError with its words.
    """
    if group is None:
        return [action()]
    result, error = None, None
    try:
        result = action()
    except Exception as problem:
        error = problem
    kind = next((kind for kind in (OSError, ValueError) if isinstance(error, kind)), RuntimeError)
    outcomes: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(outcomes, (result, kind, error and f"{type(error).__name__}: {error}"), group=group)
    if error is not None:
        raise error
    for rank, (_, kind, message) in enumerate(outcomes):
        if message:
            raise kind(f"process {rank} failed: {message}")
    return [value for value, _, _ in outcomes]


def on_first_rank(group: dist.ProcessGroup | None, action: Callable[[], T]) -> T:
    """Run `action` on rank 0 alone; its result, or its error, on all ranks."""
    first = group is None or dist.get_rank(group) == 0
    return on_all_ranks(group, lambda: action() if first else None)[0]


def is_sharded(network: nn.Module) -> "TypeGuard[FSDPModule]":
    """Whether the processes share one set of its weights (FSDP2, `tim.training.sharding.shard`)."""
    from torch.distributed.fsdp import FSDPModule  # takes half a second to import

    return isinstance(network, FSDPModule)
