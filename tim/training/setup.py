"""From a config to the parts of a training run."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from diffusers.optimization import SchedulerType, get_scheduler
from torch import nn
from torch.utils.data import DataLoader

from tim.config import Config
from tim.data.keyed import KeyedDataset
from tim.distributed import set_tf32, use_cpu
from tim.models.autoencoders import Autoencoder
from tim.models.loading import load_strict, read_state_dict
from tim.schedulers.transition import TransitionSchedule
from tim.training.ema import EMA
from tim.training.tasks import Task


@dataclass
class Run:
    """Everything the loop turns.

    Attributes:
        model: the network as it is trained (wrapped for several processes); network: the bare one.
        task: data and conditions. lr: learning rate after scaling.
        global_batch_size: data.dataloader.batch_size x accumulation x processes.
    """

    accelerator: Accelerator
    config: Config
    seed: int
    project_dir: Path
    task: Task
    network: nn.Module
    model: nn.Module
    ema: EMA | None
    schedule: TransitionSchedule
    vae: Autoencoder | None
    encoder: nn.Module | None
    optimizer: Any
    lr_scheduler: Any
    lr: float
    global_batch_size: int

    @property
    def dtype(self) -> torch.dtype:
        """dtype of weights, latents and noise."""
        return getattr(torch, self.config.training.dtype)


def build_accelerator(config: Config, project_dir: Path) -> Accelerator:
    """The accelerator of this process: DDP by torchrun or accelerate launch, on CPU when there is no GPU."""
    t = config.training
    if t.fsdp_config:
        raise ValueError("training.fsdp_config is set, but sharded training is not available; remove the key to train with DDP")
    set_tf32(t.allow_tf32)
    tracker = None if t.tracker in (None, "none") else t.tracker
    if tracker and importlib.util.find_spec(tracker) is None:
        raise ValueError(f"training.tracker={tracker} needs the package {tracker}: pip install {tracker}")
    return Accelerator(
        cpu=use_cpu(),
        mixed_precision=t.mixed_precision,
        log_with=tracker,
        project_dir=str(project_dir) if tracker else None,
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
    )


def build_run(config: Config, project_dir: Path, seed: int, task_class: type[Task]) -> Run:
    """Build network, companions, optimiser and schedule. Writes nothing.

    Raises:
        ValueError, FileNotFoundError: for anything the config names that does not fit or is not there.
    """
    if seed < 0:
        raise ValueError(f"--seed must be >= 0, got {seed}")
    t, m = config.training, config.model
    accelerator = build_accelerator(config, project_dir)
    schedule = TransitionSchedule(m.transport.build(), **m.transition_loss)
    if schedule.transport.enhance_target and not m.use_ema:
        raise ValueError("model.transport.params.enhance_target needs the EMA model: set model.use_ema=true")
    vae = Autoencoder.from_pretrained(m.vae_dir, device=accelerator.device) if m.vae_dir else None
    task = task_class(config, vae, accelerator.device)
    torch.manual_seed(seed)
    network = m.network.build().to(getattr(torch, t.dtype))
    if m.ckpt:
        load_strict(network, read_state_dict(m.ckpt), m.ckpt)
    encoder = None
    if m.enc_dir:
        from tim.models.radio import Radio

        encoder = Radio.from_checkpoint(m.enc_dir).to(accelerator.device)
    else:
        network.projector.requires_grad_(False)
    task.check(network)

    network.to(accelerator.device)
    ema = EMA(network, m.ema_decay) if m.use_ema else None
    global_batch_size = config.data.dataloader.batch_size * t.gradient_accumulation_steps * accelerator.num_processes
    lr = t.learning_rate * (global_batch_size / t.learning_rate_base_batch_size if t.scale_lr else 1.0)
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizer = t.optimizer.build(trained, lr=lr)
    if t.lr_scheduler not in [s.value for s in SchedulerType]:
        choices = ", ".join(s.value for s in SchedulerType)
        raise ValueError(f"training.lr_scheduler={t.lr_scheduler!r} is not one of {choices}")
    lr_scheduler = get_scheduler(
        t.lr_scheduler, optimizer, num_warmup_steps=t.lr_warmup_steps, num_training_steps=t.max_train_steps
    )
    model, optimizer = accelerator.prepare(network, optimizer)
    network = accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # the loop alone says where autocast is on
    return Run(
        accelerator, config, seed, project_dir, task, network, model, ema, schedule, vae, encoder,
        optimizer, lr_scheduler, lr, global_batch_size,
    )  # fmt: skip


def build_loader(run: Run, start_step: int, visits: int) -> DataLoader:
    """This rank's micro-batches from start_step on; `visits` counts what was visited before it."""
    sampler = run.task.sampler(
        run.config,
        seed=run.seed,
        accumulation=run.config.training.gradient_accumulation_steps,
        world_size=run.accelerator.num_processes,
        rank=run.accelerator.process_index,
        start_step=start_step,
        max_steps=run.config.training.max_train_steps,
        visits=visits,
    )
    return DataLoader(
        KeyedDataset(run.task.dataset, run.seed),
        batch_sampler=sampler,
        num_workers=run.config.data.dataloader.num_workers,
        pin_memory=run.accelerator.device.type == "cuda",
    )
