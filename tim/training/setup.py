"""From a config to the parts of a training run."""

import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from diffusers.optimization import get_scheduler
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from tim.checkpoint.adapters import find_base
from tim.checkpoint.warm_start import warm_start
from tim.checkpoint.weights import find_weights
from tim.config import Config, Model
from tim.data.replacement import ReplacingDataset
from tim.distributed import HALF, is_sharded, set_tf32, use_cpu
from tim.models.adapters import add_adapters
from tim.models.autoencoders import Autoencoder
from tim.models.loading import load_strict
from tim.models.network import build_network, traits_of
from tim.models.trunk import TransitionTransformer
from tim.schedulers.derivative import carries_tangents
from tim.schedulers.objective import Objective
from tim.targets import Target, constructor_keywords
from tim.training.compilation import compile_blocks, wants_compiled
from tim.training.ema import EMA
from tim.training.preemption import ignore_signals
from tim.training.sharding import shard, sharding_plugin
from tim.training.tasks import Task
from tim.training.trackers import check_tracker

if TYPE_CHECKING:
    from tim.models.radio import Radio

logger = logging.getLogger(__name__)


@dataclass
class Run:
    """Everything the loop turns.

    Attributes:
        model: the network as it is trained (wrapped for several processes); network: the bare one, the same when sharded.
        task: data and conditions. lr: learning rate after scaling.
        global_batch_size: data.dataloader.batch_size x accumulation x processes.
        base: digest of the weights that adapters are trained on, None when the network is trained itself.
    """

    accelerator: Accelerator
    config: Config
    seed: int
    project_dir: Path
    task: Task
    network: nn.Module
    model: nn.Module
    ema: EMA | None
    schedule: Objective
    vae: Autoencoder | None
    encoder: "Radio | None"
    optimizer: Any
    lr_scheduler: LambdaLR
    lr: float
    global_batch_size: int
    base: str | None = None

    @property
    def modules(self) -> dict[str, nn.Module]:
        """The network as "model", and its moving average, if the run keeps one, as "ema": names that checkpoints use."""
        return {"model": self.network} | ({"ema": self.ema.network} if self.ema else {})

    @property
    def dtype(self) -> torch.dtype:
        """dtype of weights, latents and noise."""
        return getattr(torch, self.config.training.dtype)

    @property
    def compiled(self) -> bool:
        """Whether blocks run compiled."""
        return wants_compiled(self.config.training.compile, self.accelerator.device)

    @property
    def sharded(self) -> bool:
        """Whether the processes share one set of weights; then all of them must run the network together."""
        return is_sharded(self.network)


def build_accelerator(config: Config, project_dir: Path) -> Accelerator:
    """The accelerator of this process: one of torchrun or accelerate launch, on CPU when there is no GPU."""
    t = config.training
    set_tf32(t.allow_tf32)
    tracker = check_tracker(t)
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
    plugin = sharding_plugin(t.fsdp_config)
    accelerator = build_accelerator(config, project_dir)
    schedule: Objective = m.build_objective()
    if schedule.transport.enhance_target and not m.use_ema:
        raise ValueError("model.transport.params.enhance_target needs the EMA model: set model.use_ema=true")
    vae = build_autoencoder(config, accelerator, sharded=plugin is not None)
    task = task_class(config, vae, accelerator.device)
    torch.manual_seed(seed)  # all processes draw the same starting weights
    network, base = build_start(m, getattr(torch, t.dtype))
    encoder = build_encoder(config, network, accelerator.device)
    task.check(network)
    if getattr(schedule, "guidance_max", None) is not None and not traits_of(network).guidance_input:
        raise ValueError(
            "model.transition_loss.guidance_max trains a network that takes guidance as an input: set "
            "model.network.params.guidance_input=true"
        )
    check_tangent_form(network, schedule, config, accelerator.device)

    if plugin is not None and accelerator.num_processes == 1:
        warnings.warn("training.fsdp_config has no effect with one process: nothing is sharded", stacklevel=2)
        plugin = None
    ema = EMA(network, m.ema_decay, share=plugin is None) if m.use_ema else None
    for module in (network, ema.network) if ema else (network,):
        if plugin is None:
            module.to(accelerator.device)
        else:
            shard(module, plugin, accelerator.device)
    # Sharded networks run together: a process without samples for dF/dt has to take part in the others' gathering.
    schedule.always_run_derivative = plugin is not None
    if wants_compiled(t.compile, accelerator.device):  # after the moving average was copied: a copy runs these blocks
        compile_blocks(network)
        if schedule.derivative_type == "jvp" and not carries_tangents(network):
            logger.info("training.compile: the network takes no tangents, so jvp derivatives run eagerly")
        if ema is not None and schedule.transport.enhance_target:
            compile_blocks(ema.network)
    global_batch_size = config.data.dataloader.batch_size * t.gradient_accumulation_steps * accelerator.num_processes
    lr = t.scaled_learning_rate(global_batch_size)
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizer = build_optimizer(t.optimizer, trained, lr)
    lr_scheduler = get_scheduler(
        t.lr_scheduler, optimizer, num_warmup_steps=t.lr_warmup_steps, num_training_steps=t.max_train_steps
    )
    optimizer = accelerator.prepare_optimizer(optimizer)
    alone = is_sharded(network) or accelerator.num_processes == 1  # no wrapper to synchronise gradients
    model = network if alone else accelerator.prepare_model(network)
    network = accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # the loop alone says where autocast is on
    return Run(
        accelerator, config, seed, project_dir, task, network, model, ema, schedule, vae, encoder,
        optimizer, lr_scheduler, lr, global_batch_size, base,
    )  # fmt: skip


def build_start(m: Model, dtype: torch.dtype) -> tuple[nn.Module, str | None]:
    """The network as training starts, and the digest of the weights that `model.lora` adapts, None without.

    Raises:
        ValueError, FileNotFoundError: for weights of another network, or layers that are not there.
    """
    network = build_network(m.network).to(dtype)
    if not m.enc_dir and isinstance(projector := getattr(network, "projector", None), nn.Module):
        projector.requires_grad_(False)  # no gradient would ever reach it, and DDP would wait for one
    if m.lora is not None:
        base = find_base(m)
        load_strict(network, base.read(), base.source)
        add_adapters(network, m.lora)
        return network, base.digest()
    if m.ckpt:
        start = find_weights(m.ckpt, name="model.ckpt").read()
        for note in warm_start(network, start, m.ckpt, m.ckpt_allow_missing):
            logger.info(note)
    return network, None


def check_tangent_form(network: nn.Module, schedule: Objective, config: Config, device: torch.device) -> None:
    """Raise ValueError when the network is to carry tangents in a form that cannot run here; warn when it carries none."""
    if not isinstance(network, TransitionTransformer) or network.tangent_form is None:
        return
    if schedule.derivative_type != "jvp":
        warnings.warn(
            "model.network.params.tangent_form has no effect without transition_loss.derivative_type=jvp", stacklevel=2
        )
        return
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.training.mixed_precision)
    network.check_tangent_form(device, half or getattr(torch, config.training.dtype))


def build_autoencoder(config: Config, accelerator: Accelerator, sharded: bool) -> Autoencoder | None:
    """The autoencoder that encodes images or decodes previews; None for pixels, and where a process does neither.

    Raises:
        ValueError: when it cannot be loaded.
    """
    draws = config.training.sample_steps and (accelerator.is_main_process or sharded)
    if not config.model.vae_dir or (config.data.data_type in ("latent", "latent_tar") and not draws):
        return None
    vae = Autoencoder.from_pretrained(config.model.vae_dir, getattr(torch, config.model.vae_dtype), accelerator.device)
    vae.configure(channels_last=config.model.vae_channels_last)
    return vae


def build_encoder(config: Config, network: nn.Module, device: torch.device) -> "Radio | None":
    """The frozen encoder of REPA's target; None without REPA, or when its features come from files.

    Raises:
        ValueError, FileNotFoundError: for a network without projector or with one of another width, or a missing encoder.
    """
    enc_dir, z_dim = config.model.encoder_file, traits_of(network).z_dim
    if enc_dir and z_dim is None:
        raise ValueError("model.enc_dir needs a network with a REPA projector (z_dim, return_zs); set model.enc_dir=null")
    if not enc_dir or config.data.dataset.features_dir is not None:
        return None
    from tim.models.radio import Radio

    dtype = config.model.enc_dtype and getattr(torch, config.model.enc_dtype)
    encoder = Radio.from_checkpoint(enc_dir).compute_in(dtype or HALF.get(config.training.mixed_precision)).to(device)
    if encoder.width != z_dim:
        raise ValueError(f"model.enc_dir={enc_dir} has features of width {encoder.width}; set model.network.params.z_dim to it")
    return encoder


def build_optimizer(target: Target, trained: Sequence[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    """The optimiser that a config names; on a GPU torch's own are fused where torch can and the config does not say how.

    Fused, a step is one pass over the weights, and is skipped without asking the host. On a CPU it is as it always was:
    fused it would round differently.

    Args:
        trained: the parameters, all of one dtype and on one device.
    """
    fused = replace(target, params=target.params | {"fused": True})
    if trained[0].device.type == "cuda" and not {"fused", "foreach"} & target.params.keys() and _runs(fused, trained[0]):
        target = fused
    return target.build(trained, lr=lr)


def _runs(target: Target, like: Tensor) -> bool:
    """Whether an optimiser of torch takes its parameters and can step on weights like these."""
    cls = target.resolve()
    if not cls.__module__.startswith("torch.optim.") or not target.params.keys() <= constructor_keywords(cls).keys():
        return False
    weight = nn.Parameter(torch.zeros(1, dtype=like.dtype, device=like.device))
    weight.grad = torch.zeros_like(weight)
    try:
        target.build([weight], lr=0.0).step()
    except (ValueError, RuntimeError):  # which kernels there are is for each version of torch to say
        return False
    return True


def build_loader(run: Run, start_step: int, samples_seen: int) -> tuple[DataLoader, int]:
    """This rank's micro-batches from start_step on, and what a step takes of all ranks, in the unit of `samples_seen`.

    Args:
        samples_seen: what was taken before start_step: samples, or packed batches.
    """
    sampler = run.task.sampler(
        run.config,
        seed=run.seed,
        accumulation=run.config.training.gradient_accumulation_steps,
        world_size=run.accelerator.num_processes,
        rank=run.accelerator.process_index,
        start_step=start_step,
        max_steps=run.config.training.max_train_steps,
        samples_seen=samples_seen,
    )
    loader = DataLoader(
        ReplacingDataset(run.task.dataset, run.seed),
        batch_sampler=sampler,
        num_workers=run.config.data.dataloader.num_workers,
        pin_memory=run.accelerator.device.type == "cuda",
        worker_init_fn=ignore_signals,
        generator=torch.Generator().manual_seed(run.seed),  # else the workers' seeds come from the global state
    )
    return loader, sampler.samples_per_step
