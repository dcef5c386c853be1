"""How long a training step takes, and what training spends beside: waiting for data, guards, checkpoints.

The real trainer runs in a temporary folder; only its clock is ours.
"""

import copy
import math
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tim.benchmarks.measure import (
    Results,
    conditions,
    count_flops,
    machine,
    reset_peak_memory,
    step_results,
    timed,
)
from tim.config import Config, Training
from tim.data.latents import write_latent
from tim.distributed import best_device
from tim.models.autoencoders import Autoencoder
from tim.models.network import traits_of
from tim.training.compilation import eager_blocks, wants_compiled
from tim.training.guards import NonFiniteGuard
from tim.training.logging import RunLogger
from tim.training.loop import run_steps
from tim.training.resume import CheckpointManager
from tim.training.setup import Run, build_run
from tim.training.tasks import CaptionTask, ClassTask, Task

ENDLESS = 10**9  # steps
SAVES = 3  # checkpoints that are timed, after a first one that is not: it makes the copy's memory


class RandomTask(ClassTask):
    """A random latent and random conditions of the network's shape, from memory; its own data set, of any length."""

    drop_prob, num_labels = 0.0, 0
    dataset: Any

    def __init__(self, config: Config, vae: Autoencoder | None, device: torch.device) -> None:
        self.dataset, self.batch_size, self.device = self, config.data.dataloader.batch_size, device

    def check(self, network: Any) -> None:
        """Make what fits the network."""
        self.latent = torch.randn(traits_of(network).latent_shape())
        self.channels = len(self.latent)
        self.same = conditions(network, self.batch_size, self.device)

    def prepare(self, batch: Any, dropped: Tensor) -> Any:
        """The batch has no conditions."""
        return batch

    def conditions(self, batch: Any) -> tuple[dict, dict]:
        """The same for every batch."""
        return self.same

    def __len__(self) -> int:
        return self.batch_size

    def load(self, index: int, g: np.random.Generator) -> dict[str, Any]:
        """The latent."""
        return {"latent": self.latent}


class Enough(Exception):
    """Ends the loop when everything has been seen."""


class TimedCheckpoints(CheckpointManager):
    """Notes when each checkpoint began, when training went on, and when it was on the disk."""

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self.began: list[float] = []
        self.resumed: list[float] = []
        self.ended: list[float] = []

    def save(self, step: int, samples_seen: int) -> None:
        """Save and note the time."""
        self.began.append(time.perf_counter())
        super().save(step, samples_seen)
        self.resumed.append(time.perf_counter())

    def _write(self, *arguments: Any) -> None:
        super()._write(*arguments)
        self.ended.append(time.perf_counter())


class Stopwatch(RunLogger):
    """Stands in for the trainer's logger: notes the end of every step, and orders a checkpoint `pause` steps after the last.

    Args:
        training: of the run's config; the trainer saves after every step that `checkpointing_steps` divides.
        saves: checkpoints on the disk before the run ends; with 0 of them it ends after `pause` steps.
        after_step: called at the end of every step.
    """

    def __init__(
        self, checkpoints: TimedCheckpoints, training: Training, pause: int, saves: int, after_step: Callable[[], None]
    ) -> None:
        self.checkpoints, self.training, self.pause, self.saves = checkpoints, training, pause, saves
        self.after_step = after_step
        self.ends, self.orders = [time.perf_counter()], 1
        self.waits: list[float] = []
        training.checkpointing_steps = pause

    def step(self, waited: float, images: int) -> None:
        """Note the end of a step and the seconds it waited for data."""
        self.ends.append(time.perf_counter())
        self.waits.append(waited)
        self.after_step()
        written = len(self.checkpoints.ended)
        if written == self.saves and len(self.waits) >= self.pause:
            raise Enough
        if written == self.orders:
            self.orders += 1
            self.training.checkpointing_steps = len(self.waits) + self.pause

    def log(self, step: int, values: dict[str, float]) -> None:
        """Nothing is logged."""


def bench_train(config: Config, batch_size: int, steps: int, warmup: int) -> Results:
    """Time whole steps of the trainer on random latents in memory: objective, backward, clip, optimiser and EMA.

    REPA is left out: its frozen encoder is not part of the network.

    Args:
        batch_size: images a process and micro-batch.
        steps: that are timed, after `warmup` others.

    Returns:
        The median step beside the floating-point operations of one that runs eagerly.
    """
    with tempfile.TemporaryDirectory() as folder:
        run = random_run(config, batch_size, Path(folder))
        with eager_blocks(run.compiled):
            flops = count_flops(lambda: watch(run, 1))
        return {"what": "train", **time_steps(run, flops, steps, warmup)}


def random_run(config: Config, batch_size: int, folder: Path) -> Run:
    """A run of the trainer on random latents and conditions in memory, without REPA; `watch` turns its loop."""
    config = _prepare(config, batch_size)
    config.data.dataloader.num_workers = 0
    config.model.vae_dir = config.model.enc_dir = None
    return build_run(config, folder, 0, RandomTask)


def time_steps(run: Run, flops: int, steps: int, warmup: int) -> Results:
    """The median of `steps` steps after `warmup` others, whose time is beside it.

    Args:
        flops: floating-point operations of a step.
    """
    device = run.accelerator.device
    reset_peak_memory(device)
    ends = watch(run, warmup + steps).ends
    seconds = median(end - begin for begin, end in list(pairwise(ends))[warmup:])
    results = step_results(run.config, device, run.global_batch_size, seconds, flops)
    return {**results, "warmup_seconds": ends[warmup] - ends[0]}


def bench_overhead(config: Config, batch_size: int, steps: int, warmup: int, random_latents: int | None) -> Results:
    """Train, with `steps` undisturbed steps between checkpoints: asynchronous ones first, then synchronous ones.

    Args:
        config: a trainer's. Its data are read, unless random_latents is given.
        random_latents: number of latent files of the network's shape to write and train on, without REPA and autoencoder.

    Returns:
        Seconds are medians, shares are of the undisturbed step time.
        data_wait_share: time in which the device had nothing to compute because data was missing.
        guard_share: the guard's work for one step, done alone.
        save_seconds: what a synchronous checkpoint stops training for.
        async_blocked_seconds: what an asynchronous one stops it for; async_write_seconds: until it is on the disk.
        async_share: how much longer the steps from its beginning to its end took, the stop included, than undisturbed ones.
        async_steps: how many these were, of all timed checkpoints.

    Raises:
        ValueError: when captions are to be random, or warm-up takes all undisturbed steps.
    """
    if warmup >= SAVES * steps:
        raise ValueError(f"--warmup {warmup} leaves nothing to measure of --steps {steps}")
    config = _prepare(config, batch_size)
    task: type[Task] = CaptionTask if config.data.data_type == "image_ms" else ClassTask
    with tempfile.TemporaryDirectory() as folder:
        if random_latents is not None:
            _use_random_latents(config, Path(folder) / "latents", random_latents)
        config.training.async_checkpoint = True
        run = build_run(config, Path(folder) / "async", 0, task)
        background = watch(run, steps, SAVES + 1)
        config.training.async_checkpoint = False
        direct = watch(build_run(config, Path(folder) / "sync", 0, task), steps, 2)
        size = sum(file.stat().st_size for file in (Path(folder) / "sync").rglob("step-*/*")) / 2**30
        guard_seconds = _time_guard(run, Path(folder))

    saves = list(zip(background.checkpoints.began, background.checkpoints.resumed, background.checkpoints.ended, strict=True))
    first, timed_saves = saves[0], saves[1:]
    all_steps = [(*ends, waited) for ends, waited in zip(pairwise(background.ends), background.waits, strict=True)][warmup:]
    disturbed = [any(begun <= end and begin <= written for begun, _, written in saves) for begin, end, _ in all_steps]
    calm = [step for step, touched in zip(all_steps, disturbed, strict=True) if not touched]
    saving = [step for step, touched in zip(all_steps, disturbed, strict=True) if touched and step[0] > first[2]]
    step_seconds = median(end - begin for begin, end, _ in calm)
    return {
        **machine(run.accelerator.device),
        "precision": config.training.mixed_precision,
        "batch_size": batch_size,
        "trained_parameters": sum(p.numel() for p in run.network.parameters() if p.requires_grad),
        "checkpoint_gib": size,
        "step_seconds": step_seconds,
        "images_per_second": run.global_batch_size / step_seconds,
        "data_wait_share": sum(waited for _, _, waited in calm) / sum(end - begin for begin, end, _ in calm),
        "guard_seconds": guard_seconds,
        "guard_share": guard_seconds / step_seconds,
        "save_seconds": direct.checkpoints.resumed[1] - direct.checkpoints.began[1],
        "async_blocked_seconds": median(resumed - begun for begun, resumed, _ in timed_saves),
        "async_write_seconds": median(written - begun for begun, _, written in timed_saves),
        "async_steps": len(saving),
        "async_share": sum(end - begin for begin, end, _ in saving) / (len(saving) * step_seconds) - 1,
    }


def _prepare(config: Config, batch_size: int) -> Config:
    """The config of a run that goes on until it is stopped and does nothing but train."""
    config = copy.deepcopy(config)
    config.data.dataloader.batch_size = batch_size
    t = config.training
    t.max_train_steps = t.log_steps = ENDLESS
    t.compile = wants_compiled(t.compile, best_device())
    t.checkpoint_list, t.checkpoints_total_limit, t.sample_steps, t.resume_from_checkpoint = [], 1, None, "latest"
    return config


def watch(run: Run, pause: int, saves: int = 0, after_step: Callable[[], None] = lambda: None) -> Stopwatch:
    """Train until `saves` checkpoints are written, `pause` steps apart; see `Stopwatch`."""
    checkpoints = TimedCheckpoints(run)
    with checkpoints.preemption:
        stopwatch = Stopwatch(checkpoints, run.config.training, pause, saves, after_step)
        start, samples_seen = checkpoints.resume()
        try:
            run_steps(run, checkpoints, stopwatch, start, samples_seen)
        except Enough:
            checkpoints.close()
    return stopwatch


def _time_guard(run: Run, folder: Path) -> float:
    """Seconds of everything the guard does in a step, one step after the other on a device that has nothing else to do."""
    device, norm = run.accelerator.device, torch.ones((), device=run.accelerator.device)
    guard = NonFiniteGuard(device, folder, 0, spike=run.config.training.max_grad_norm_spike)
    samples = torch.arange(run.config.data.dataloader.batch_size)
    codes = torch.zeros(len(samples), dtype=torch.int64, device=device)

    def judge() -> None:
        guard.poll()
        guard.judge(norm)
        guard.post(1, norm, [({"index": samples, "position": samples}, codes)])

    return timed(judge, device, 200, 20)[0]


def _use_random_latents(config: Config, folder: Path, count: int) -> None:
    """Write latents of the network's shape in two classes, and let the config train on them."""
    if config.data.data_type == "image_ms":
        raise ValueError("--random-latents works for class-conditional training only")
    shape, generator = traits_of(config.model.network).latent_shape(), torch.Generator().manual_seed(0)
    for label in (0, 1):
        (folder / f"{label}").mkdir(parents=True)
        for k in range(math.ceil(count / 2)):
            latent = torch.randn(2, *shape, generator=generator)
            write_latent(folder / f"{label}" / f"{k:06d}.safetensors", latent, label)
    config.data.data_type, config.data.dataset = "latent", type(config.data.dataset)(latent_dir=str(folder))
    config.model.vae_dir = config.model.enc_dir = None
