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

from tim import rng
from tim.config import Config
from tim.data.c2i import C2IDataset, KeyedDataset
from tim.data.sampler import StepBatchSampler
from tim.distributed import set_tf32, use_cpu
from tim.models.autoencoders import Autoencoder
from tim.models.loading import load_strict, read_state_dict
from tim.schedulers.transition import TransitionSchedule
from tim.training.ema import EMA


@dataclass
class Run:
    """Everything the loop turns.

    Attributes:
        model: the network as it is trained (wrapped for several processes); network: the bare one.
        lr: learning rate after scaling; global_batch_size: samples per optimiser step over all processes.
    """

    accelerator: Accelerator
    config: Config
    seed: int
    project_dir: Path
    dataset: C2IDataset
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


def build_run(config: Config, project_dir: Path, seed: int, dataset: C2IDataset) -> Run:
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
    torch.manual_seed(seed)
    network = m.network.build().to(getattr(torch, t.dtype))
    if m.ckpt:
        load_strict(network, read_state_dict(m.ckpt), m.ckpt)
    vae = Autoencoder.from_pretrained(m.vae_dir, device=accelerator.device) if m.vae_dir else None
    encoder = None
    if m.enc_dir:
        from tim.models.radio import Radio

        encoder = Radio.from_checkpoint(m.enc_dir).to(accelerator.device)
    else:
        network.projector.requires_grad_(False)
    check_dataset(config, dataset, network, vae)

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
        accelerator, config, seed, project_dir, dataset, network, model, ema, schedule, vae, encoder,
        optimizer, lr_scheduler, lr, global_batch_size,
    )  # fmt: skip


def build_loader(run: Run, start_step: int, samples_seen: int) -> DataLoader:
    """This rank's micro-batches from start_step on."""
    loader = run.config.data.dataloader
    sampler = StepBatchSampler(
        size=len(run.dataset),
        seed=run.seed,
        batch_size=loader.batch_size,
        accumulation=run.config.training.gradient_accumulation_steps,
        world_size=run.accelerator.num_processes,
        rank=run.accelerator.process_index,
        start_step=start_step,
        max_steps=run.config.training.max_train_steps,
        samples_seen=samples_seen,
    )
    return DataLoader(
        KeyedDataset(run.dataset, run.seed),
        batch_sampler=sampler,
        num_workers=loader.num_workers,
        pin_memory=run.accelerator.device.type == "cuda",
    )


def check_dataset(config: Config, dataset: C2IDataset, network: nn.Module, vae: Autoencoder | None) -> None:
    """Compare one sample with the network: latent shape, channels, number of classes."""
    sample = dataset.load(0, rng.generator(0, "data"))
    if "latent" in sample:
        shape = tuple(sample["latent"].shape)
    elif vae is not None:
        shape = vae.latent_shape(*sample["image"].shape[1:])
    else:
        shape = tuple(sample["image"].shape)
    if shape[0] != network.in_channels or shape[1] % network.patch_size or shape[2] % network.patch_size:
        raise ValueError(
            f"latents are {shape}, but the network takes {network.in_channels} channels and sides divisible by "
            f"patch_size={network.patch_size}; check data.dataset.image_size, model.vae_dir and model.network.params"
        )
    if dataset.num_labels > network.num_classes or sample["label"] >= network.num_classes:
        raise ValueError(
            f"the dataset has {dataset.num_labels} classes, model.network.params.num_classes is {network.num_classes}"
        )
