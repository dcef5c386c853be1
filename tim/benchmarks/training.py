"""What training spends beside training: waiting for data, guards against non-finite steps, checkpoints.

The real trainer runs in a temporary folder; only its clock is ours.
"""

import copy
import math
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from tim.benchmarks.measure import Report, device_name, timed
from tim.config import Config, Training
from tim.data.latents import write_latent
from tim.models.network import traits_of
from tim.training.guards import NonFiniteGuard
from tim.training.loop import run_steps
from tim.training.resume import CheckpointManager
from tim.training.setup import Run, build_run
from tim.training.tasks import CaptionTask, ClassTask

ENDLESS = 10**9  # steps
SAVES = 3  # checkpoints that are timed, after a first one that is not: it makes the copy's memory


@dataclass
class OverheadMeasurement(Report):
    """Seconds are medians. Shares are of the undisturbed step time.

    Attributes:
        data_wait_share: time in which the device had nothing to compute because data was missing.
        guard_share: the guard's work for one step, done alone.
        save_seconds: what a synchronous checkpoint stops training for.
        async_blocked_seconds: what an asynchronous one stops it for; async_write_seconds: until it is on the disk.
        async_share: how much longer the steps from its beginning to its end took, the stop included, than undisturbed ones.
        async_steps: how many these were, of all timed checkpoints.
    """

    device: str
    precision: str
    batch_size: int
    trained_parameters: int
    checkpoint_gib: float
    step_seconds: float
    images_per_second: float
    data_wait_share: float
    guard_seconds: float
    guard_share: float
    save_seconds: float
    async_blocked_seconds: float
    async_write_seconds: float
    async_steps: int
    async_share: float
    torch: str = torch.__version__


class Enough(Exception):
    """Ends the loop when everything has been seen."""


class TimedCheckpoints(CheckpointManager):
    """Notes when each checkpoint began, when training went on, and when it was on the disk."""

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self.began, self.resumed, self.ended = [], [], []

    def save(self, step: int, samples_seen: int) -> None:
        """Save and note the time."""
        self.began.append(time.perf_counter())
        super().save(step, samples_seen)
        self.resumed.append(time.perf_counter())

    def _write(self, *arguments: Any) -> None:
        super()._write(*arguments)
        self.ended.append(time.perf_counter())


class Stopwatch:
    """Stands in for the trainer's logger: notes the end of every step, and orders a checkpoint `pause` steps after the last.

    Args:
        training: of the run's config; the trainer saves after every step that `checkpointing_steps` divides.
        saves: checkpoints on the disk before the run ends.
    """

    def __init__(self, checkpoints: TimedCheckpoints, training: Training, pause: int, saves: int) -> None:
        self.checkpoints, self.training, self.pause, self.saves = checkpoints, training, pause, saves
        self.ends, self.waited, self.orders = [time.perf_counter()], [], 1
        training.checkpointing_steps = pause

    def step(self, waited: float, images: int) -> None:
        """Note the end of a step and the seconds it waited for data."""
        self.ends.append(time.perf_counter())
        self.waited.append(waited)
        written = len(self.checkpoints.ended)
        if written == self.saves:
            raise Enough
        if written == self.orders:
            self.orders += 1
            self.training.checkpointing_steps = len(self.waited) + self.pause

    def log(self, step: int, values: dict[str, float]) -> None:
        """Nothing is logged."""


def bench_overhead(config: Config, batch_size: int, steps: int, warmup: int, random_latents: int | None) -> OverheadMeasurement:
    """Train, with `steps` undisturbed steps between checkpoints: asynchronous ones first, then synchronous ones.

    Args:
        config: a trainer's. Its data are read, unless random_latents is given.
        random_latents: number of latent files of the network's shape to write and train on, without REPA and autoencoder.

    Raises:
        ValueError: when captions are to be random, or warm-up takes all undisturbed steps.
    """
    if warmup >= SAVES * steps:
        raise ValueError(f"--warmup {warmup} leaves nothing to measure of --steps {steps}")
    with tempfile.TemporaryDirectory() as folder:
        config = copy.deepcopy(config)
        config.data.dataloader.batch_size = batch_size
        if random_latents is not None:
            _use_random_latents(config, Path(folder) / "latents", random_latents)
        t = config.training
        t.max_train_steps = t.log_steps = ENDLESS
        t.checkpoint_list, t.checkpoints_total_limit, t.sample_steps, t.resume_from_checkpoint = [], 1, None, "latest"
        t.async_checkpoint = True
        background, run = _watch(config, Path(folder) / "async", steps, SAVES + 1)
        t.async_checkpoint = False
        direct, _ = _watch(config, Path(folder) / "sync", steps, 2)
        size = sum(file.stat().st_size for file in (Path(folder) / "sync").rglob("step-*/*")) / 2**30
        guard_seconds = _time_guard(run, Path(folder))

    saves = list(zip(background.checkpoints.began, background.checkpoints.resumed, background.checkpoints.ended, strict=True))
    first, timed_saves = saves[0], saves[1:]
    all_steps = list(zip(background.ends[:-1], background.ends[1:], background.waited, strict=True))[warmup:]
    disturbed = [any(begun <= end and begin <= written for begun, _, written in saves) for begin, end, _ in all_steps]
    calm = [step for step, touched in zip(all_steps, disturbed, strict=True) if not touched]
    saving = [step for step, touched in zip(all_steps, disturbed, strict=True) if touched and step[0] > first[2]]
    step_seconds = median(end - begin for begin, end, _ in calm)
    return OverheadMeasurement(
        device=device_name(run.accelerator.device),
        precision=t.mixed_precision,
        batch_size=batch_size,
        trained_parameters=sum(p.numel() for p in run.network.parameters() if p.requires_grad),
        checkpoint_gib=size,
        step_seconds=step_seconds,
        images_per_second=run.global_batch_size / step_seconds,
        data_wait_share=sum(waited for _, _, waited in calm) / sum(end - begin for begin, end, _ in calm),
        guard_seconds=guard_seconds,
        guard_share=guard_seconds / step_seconds,
        save_seconds=direct.checkpoints.resumed[1] - direct.checkpoints.began[1],
        async_blocked_seconds=median(resumed - begun for begun, resumed, _ in timed_saves),
        async_write_seconds=median(written - begun for begun, _, written in timed_saves),
        async_steps=len(saving),
        async_share=sum(end - begin for begin, end, _ in saving) / (len(saving) * step_seconds) - 1,
    )


def _watch(config: Config, folder: Path, pause: int, saves: int) -> tuple[Stopwatch, Run]:
    """Train until `saves` checkpoints are written, `pause` steps apart."""
    run = build_run(config, folder, 0, CaptionTask if config.data.data_type == "image_ms" else ClassTask)
    checkpoints = TimedCheckpoints(run)
    with checkpoints.preemption:
        watch = Stopwatch(checkpoints, config.training, pause, saves)
        start, samples_seen = checkpoints.resume()
        try:
            run_steps(run, checkpoints, watch, start, samples_seen)
        except Enough:
            checkpoints.close()
    return watch, run


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
