"""Which device this process runs on, and how it multiplies."""

import os

import torch


def use_cpu() -> bool:
    """Whether accelerate must be told to use the CPU (gloo between processes): several processes and no CUDA device."""
    return not torch.cuda.is_available() and int(os.environ.get("WORLD_SIZE", 1)) > 1


def set_tf32(allowed: bool) -> None:
    """Allow TF32 in float32 products on CUDA."""
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed
