"""Which device this process runs on, and how it multiplies."""

import os

import torch


def use_cpu() -> bool:
    """Whether accelerate must be told to use the CPU (gloo between processes): several processes and no CUDA device."""
    return not torch.cuda.is_available() and int(os.environ.get("WORLD_SIZE", 1)) > 1


HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}  # names of mixed precision


def frozen_dtype(mixed_precision: str, device: torch.device) -> torch.dtype:
    """dtype of a model that is not trained: the mixed precision's on a GPU, float32 on a CPU."""
    return HALF.get(mixed_precision, torch.float32) if device.type == "cuda" else torch.float32


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
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return
    if not (failed and torch.distributed.get_backend() == "nccl"):
        torch.distributed.destroy_process_group()
