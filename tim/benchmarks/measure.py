"""Speed and memory of training and sampling, on random latents in memory."""

import dataclasses
import platform
import resource
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tim.config import Config
from tim.distributed import HALF, set_tf32, use_cpu
from tim.generation.engine import network_dtype
from tim.models.network import build_network, freeze_projector, traits_of
from tim.schedulers.objective import Objective
from tim.schedulers.sampling import sample
from tim.training.ema import EMA


class Report:
    """What a benchmark found; a dataclass."""

    def table(self) -> str:
        """One line per value."""
        rows = dataclasses.asdict(self).items()
        return "\n".join(f"{k:>22}  {f'{v:.4g}' if isinstance(v, float) else v}" for k, v in rows if v is not None)


@dataclass
class Measurement(Report):
    """One benchmark. Times in seconds (median over the steps), memory in GiB, rates in TFLOP/s."""

    what: str
    device: str
    precision: str
    compiled: bool
    batch_size: int
    step_seconds: float
    images_per_second: float
    peak_memory_gib: float
    model_tflop_per_step: float
    achieved_tflops: float
    matmul_tflops: float
    matmul_share: float
    nfe: int | None
    torch: str = torch.__version__
    python: str = platform.python_version()


def bench_train(config: Config, batch_size: int, steps: int, warmup: int, compiled: bool) -> Measurement:
    """Time the whole optimiser step: objective with its derivative passes, backward, clip, AdamW and EMA.

    REPA is left out: its frozen encoder is not part of the network.
    """
    device = best_device()
    network = build_network(config.model.network).to(device)
    freeze_projector(network)
    ema = EMA(network, config.model.ema_decay)
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizer = config.training.optimizer.build(trained, lr=config.training.learning_rate)
    schedule: Objective = config.model.build_objective()
    x = torch.randn(batch_size, *traits_of(network).latent_shape(), device=device)
    cond, uncond = conditions(network, batch_size, device)
    set_tf32(config.training.allow_tf32)

    def step(model: nn.Module) -> None:
        with autocast(config, device):
            loss, _, _ = schedule(
                model, ema.network, model, batch_size, x, torch.randn_like(x), cond,
                use_dir_loss=config.model.use_dir_loss, null_kwargs=uncond,
            )  # fmt: skip
        loss.backward()
        nn.utils.clip_grad_norm_(trained, config.training.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.update(network)

    return measure("train", config, device, network, step, batch_size, steps, warmup, compiled, None)


def bench_sample(
    config: Config, batch_size: int, steps: int, warmup: int, compiled: bool, num_steps: int, cfg_scale: float
) -> Measurement:
    """Time drawing one batch of latents, without text encoder and decoder."""
    device = best_device()
    network = build_network(config.model.network).to(device, network_dtype(config, "auto", device)).eval()
    transport = config.model.transport.build()
    z = torch.randn(batch_size, *traits_of(network).latent_shape(), device=device)
    cond, uncond = conditions(network, batch_size, device)
    set_tf32(config.training.allow_tf32)
    spent = []

    def step(model: nn.Module) -> None:
        spent.append(sample(transport, model, z, cond, uncond, num_steps=num_steps, cfg_scale=cfg_scale).nfe)

    result = measure("sample", config, device, network, step, batch_size, steps, warmup, compiled, num_steps)
    return dataclasses.replace(result, nfe=spent[-1])


def measure(
    what: str,
    config: Config,
    device: torch.device,
    network: nn.Module,
    step: Callable[[nn.Module], None],
    batch_size: int,
    steps: int,
    warmup: int,
    compiled: bool,
    nfe: int | None,
) -> Measurement:
    """Count the floating-point operations of one eager step, warm up, then time `steps` of them."""
    with FlopCounterMode(display=False) as counter:
        step(network)
    flops = counter.get_total_flops()
    model = torch.compile(network) if compiled else network
    for _ in range(max(warmup, int(compiled))):
        step(model)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds, _ = timed(lambda: step(model), device, steps, 0)
    matmul = matmul_rate(device, HALF.get(config.training.mixed_precision, torch.float32))
    return Measurement(
        what=what,
        device=device_name(device),
        precision=config.training.mixed_precision,
        compiled=compiled,
        batch_size=batch_size,
        step_seconds=seconds,
        images_per_second=batch_size / seconds,
        peak_memory_gib=peak_memory(device),
        model_tflop_per_step=flops / 1e12,
        achieved_tflops=flops / seconds / 1e12,
        matmul_tflops=matmul,
        matmul_share=flops / seconds / 1e12 / matmul,
        nfe=nfe,
    )


def device_name(device: torch.device) -> str:
    """The GPU's name, or the device type and number of threads."""
    return torch.cuda.get_device_name() if device.type == "cuda" else f"{device.type}, {torch.get_num_threads()} threads"


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Measured rate of one large square matrix product, TFLOP/s: what this machine can do at best."""
    n = 8192 if device.type == "cuda" else 1024
    a = torch.randn(n, n, device=device, dtype=dtype)
    times = []
    for _ in range(8):
        synchronize(device)
        began = time.perf_counter()
        a @ a
        synchronize(device)
        times.append(time.perf_counter() - began)
    return 2 * n**3 / min(times) / 1e12


def conditions(network: nn.Module, batch_size: int, device: torch.device) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Random labels or captions of 64 tokens, and their null."""
    traits = traits_of(network)
    if traits.cap_feat_dim is None:
        classes = traits.num_classes or 1
        y = torch.randint(classes, (batch_size,), device=device)
        return {"y": y}, {"y": torch.full_like(y, classes)}
    y = torch.randn(batch_size, 64, traits.cap_feat_dim, device=device)
    return {"y": y}, {"y": torch.zeros_like(y)}


def timed(run: Callable[[], Any], device: torch.device, repeats: int, warmup: int) -> tuple[float, Any]:
    """Median seconds of `run` after `warmup` untimed calls, and what it returned last."""
    for _ in range(warmup):
        run()
    times, result = [], None
    for _ in range(repeats):
        synchronize(device)
        began = time.perf_counter()
        result = run()
        synchronize(device)
        times.append(time.perf_counter() - began)
    return sorted(times)[len(times) // 2], result


def best_device() -> torch.device:
    """The device accelerate would choose."""
    from accelerate import PartialState

    return PartialState(cpu=use_cpu()).device


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def peak_memory(device: torch.device) -> float:
    """GiB: allocated on the GPU, or the resident size of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def autocast(config: Config, device: torch.device) -> AbstractContextManager:
    """The config's mixed precision."""
    half = HALF.get(config.training.mixed_precision)
    return nullcontext() if half is None else torch.autocast(device.type, dtype=half)
