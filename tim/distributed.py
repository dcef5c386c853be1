"""Which device this process runs on."""

import os

import torch


def use_cpu() -> bool:
    """Whether accelerate must be told to use the CPU (gloo between processes): several processes and no CUDA device."""
    return not torch.cuda.is_available() and int(os.environ.get("WORLD_SIZE", 1)) > 1
