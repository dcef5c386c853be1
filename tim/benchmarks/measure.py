"""What the benchmarks share: the device, its clock and memory, its best rate, random conditions, the form of results."""

import platform
import resource
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tim.config import Config
from tim.distributed import HALF
from tim.models.network import traits_of

Results = dict[str, float | int | str | None]  # by name; times in seconds unless named _ms, memory in GiB


def table(results: Results) -> str:
    """One line per value."""
    rows = [(k, v) for k, v in results.items() if v is not None]
    width = max(len(k) for k, _ in rows)
    return "\n".join(f"{k:>{width}}  {f'{v:.4g}' if isinstance(v, float) else v}" for k, v in rows)


def machine(device: torch.device) -> Results:
    """The GPU's name, or the device type and number of threads; and what runs on it."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{device.type}, {torch.get_num_threads()} threads"
    return {"device": name, "torch": torch.__version__, "python": platform.python_version()}


def step_results(
    config: Config, device: torch.device, batch_size: int, seconds: float, flops: int, nfe: int | None = None
) -> Results:
    """What a step costs, beside the best that the machine can do in the config's precision.

    Args:
        batch_size: images a step.
        flops: floating-point operations of a step.
    """
    matmul = matmul_rate(device, HALF.get(config.training.mixed_precision, torch.float32))
    return {
        **machine(device),
        "precision": config.training.mixed_precision,
        "compiled": config.training.compile,
        "batch_size": batch_size,
        "step_seconds": seconds,
        "images_per_second": batch_size / seconds,
        "peak_memory_gib": peak_memory(device),
        "model_tflop_per_step": flops / 1e12,
        "achieved_tflops": flops / seconds / 1e12,
        "matmul_tflops": matmul,
        "matmul_share": flops / seconds / 1e12 / matmul,
        "nfe": nfe,
    }


def copy_bandwidth(device: torch.device) -> float:
    """Measured rate of copying memory to memory, GB/s, read and written bytes counted: what this machine can do at best."""
    a = torch.randn(2**28 if device.type == "cuda" else 2**24, device=device)
    b = torch.empty_like(a)
    return 2 * a.nbytes / min(times(lambda: b.copy_(a), device, 8)[0]) / 1e9


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Measured rate of one large square matrix product, TFLOP/s: what this machine can do at best."""
    n = 8192 if device.type == "cuda" else 1024
    a = torch.randn(n, n, device=device, dtype=dtype)
    return 2 * n**3 / min(times(lambda: a @ a, device, 8)[0]) / 1e12


def count_flops(run: Callable[[], Any]) -> int:
    """Floating-point operations of the matrix products and attentions of a call, which must run eagerly."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def timed(run: Callable[[], Any], device: torch.device, repeats: int, warmup: int) -> tuple[float, Any]:
    """Median seconds of `run` after `warmup` untimed calls, and what it returned last."""
    for _ in range(warmup):
        run()
    seconds, result = times(run, device, repeats)
    return median(seconds), result


def times(run: Callable[[], Any], device: torch.device, repeats: int) -> tuple[list[float], Any]:
    """Seconds of each call of `run`, and what it returned last."""
    seconds, result = [], None
    for _ in range(repeats):
        synchronize(device)
        began = time.perf_counter()
        result = run()
        synchronize(device)
        seconds.append(time.perf_counter() - began)
    return seconds, result


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def reset_peak_memory(device: torch.device) -> None:
    """Forget the largest use so far, where that can be forgotten."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def peak_memory(device: torch.device) -> float:
    """GiB: allocated on the GPU, or the resident size of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def conditions(
    network: nn.Module, batch_size: int, device: torch.device, tokens: int = 64
) -> tuple[dict[str, Tensor | None], dict[str, Tensor | None]]:
    """Keywords of the network: random labels, or captions of up to `tokens` tokens; and those without condition."""
    traits = traits_of(network)
    if traits.cap_feat_dim is None:
        classes = traits.num_classes or 1
        y = torch.randint(classes, (batch_size,), device=device)
        return {"y": y}, {"y": torch.full_like(y, classes)}
    y = torch.randn(batch_size, tokens, traits.cap_feat_dim, device=device)
    lengths = torch.linspace(tokens / 2, tokens, batch_size, device=device).ceil()  # as captions have, so that there is a mask
    y_mask = torch.arange(tokens, device=device) < lengths[:, None]
    return {"y": y, "y_mask": y_mask}, {"y": torch.zeros_like(y[:, :1]), "y_mask": None}  # the empty caption is one token
