"""Sharded training (FSDP2): every process keeps its part of weights, gradients, optimiser state and moving average.

Every transformer block is a unit and the rest of the network another; a unit is gathered while it runs. All processes
gather together, so each must run the network as often as the others.
"""

import os
import warnings
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from tim.distributed import is_sharded

NO_EFFECT = {
    "backward_prefetch", "cpu_ram_efficient_loading", "forward_prefetch", "limit_all_gathers", "min_num_params",
    "state_dict_type", "sync_module_states", "use_orig_params",
}  # fmt: skip
REFUSED = {
    "mixed_precision_policy": "it would round the times to half precision; training.mixed_precision says what runs in half",
    "ignored_modules": "all of the network is sharded",
    "param_init_fn": "the network initialises itself",
    "state_dict_config": "checkpoints have one format",
    "optim_state_dict_config": "checkpoints have one format",
}
RESHARD = {"FULL_SHARD": True, "SHARD_GRAD_OP": False}  # sharding_strategy of FSDP1 in the words of FSDP2


def sharding_plugin(fsdp_config: dict[str, Any] | None) -> FullyShardedDataParallelPlugin | None:
    """accelerate's plugin that says how to shard, None to train with whole copies (DDP).

    Args:
        fsdp_config: `training.fsdp_config`, keywords of the plugin. None shards only when `accelerate launch` was told to;
            its settings hold for every keyword that is not given here.

    Raises:
        ValueError: for a setting that cannot be honoured.
    """
    launched = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if fsdp_config is None and not launched:
        return None
    given = {key: value for key, value in (fsdp_config or {}).items() if value is not None}
    for key in REFUSED.keys() & given.keys():
        raise ValueError(f"training.fsdp_config.{key}={given[key]!r} cannot be set: {REFUSED[key]}; remove it")
    idle = sorted(NO_EFFECT & given.keys())
    if idle:
        warnings.warn(f"no effect under FSDP2 and ignored, in training.fsdp_config: {', '.join(idle)}", stacklevel=2)
    values = {key: value for key, value in given.items() if key not in NO_EFFECT}
    strategy = values.pop("sharding_strategy", None)
    if strategy is not None:
        if strategy not in list(RESHARD):  # which has no need to hash what a file says
            raise ValueError(f"training.fsdp_config.sharding_strategy={strategy!r} is not one of {', '.join(RESHARD)}")
        values.setdefault("reshard_after_forward", RESHARD[strategy])
    if fsdp_config is not None:
        values.setdefault("fsdp_version", 2)
    if "FSDP_AUTO_WRAP_POLICY" not in os.environ:
        values.setdefault("auto_wrap_policy", "TRANSFORMER_BASED_WRAP")
    # Before the plugin takes them for settings of FSDP1, its default.
    version = values.get("fsdp_version", os.environ.get("FSDP_VERSION", "1"))
    if str(version) != "2":
        raise ValueError(
            f"fsdp_version={version} is not supported: set fsdp_version: 2 (fsdp_config of the accelerate file too)"
        )
    if not isinstance(values.get("reshard_after_forward", True), bool):
        raise ValueError(
            f"training.fsdp_config.reshard_after_forward must be true or false, got {values['reshard_after_forward']!r}"
        )
    names = values.get("transformer_cls_names_to_wrap", [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"training.fsdp_config.transformer_cls_names_to_wrap must be a list of class names, got {names!r}")
    plugin = FullyShardedDataParallelPlugin(mixed_precision_policy=MixedPrecisionPolicy(), **values)
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        raise ValueError("fsdp_config: cpu_offload (fsdp_offload_params) is not supported; set it to false")
    if plugin.auto_wrap_policy not in (None, transformer_auto_wrap_policy):
        raise ValueError("fsdp_config: auto_wrap_policy must be TRANSFORMER_BASED_WRAP or NO_WRAP, got SIZE_BASED_WRAP")
    return plugin


def shard(network: nn.Module, plugin: FullyShardedDataParallelPlugin, device: torch.device) -> None:
    """Shard a network in place over all processes; it moves to `device` unit by unit, never whole.

    Args:
        network: with the same weights in every process.

    Raises:
        ValueError: when `transformer_cls_names_to_wrap` names a class that the network does not have.
    """
    names = (plugin.transformer_cls_names_to_wrap or ["Block"]) if plugin.auto_wrap_policy else []
    units = [m for m in network.modules() if type(m).__name__ in names]
    missing = set(names) - {type(m).__name__ for m in units}
    if missing:
        raise ValueError(
            f"fsdp_config: transformer_cls_names_to_wrap={names}, but the network has no {missing.pop()}; use Block"
        )
    if plugin.activation_checkpointing:
        vars(network)["use_checkpoint"] = True  # the network's own checkpointing, block by block
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    trained = any(p.requires_grad for p in network.parameters())
    for unit in reversed(units):  # inner units before outer ones, as fully_shard asks for
        # Of a moving average no backward pass gives back what a forward pass gathered, so each pass has to.
        fully_shard(unit, mesh=mesh, reshard_after_forward=plugin.reshard_after_forward or not trained)
    fully_shard(network, mesh=mesh)


def reshard(network: nn.Module) -> None:
    """Free what forward passes without a backward pass left gathered; an unsharded network stays as it is."""
    for module in network.modules():
        if is_sharded(module):
            module.reshard()


def set_gradient_sync(model: nn.Module, wanted: bool) -> None:
    """Whether the next passes sum their gradients, and those kept before, over the processes; False keeps them here."""
    if is_sharded(model):
        model.set_requires_gradient_sync(wanted)
    elif isinstance(model, DistributedDataParallel):
        model.require_backward_grad_sync = wanted


def clip_gradients(
    accelerator: Accelerator, model: nn.Module, max_norm: float, in_step: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Scale the gradients to at most `max_norm`, the norm taken over all parameters of all processes.

    Args:
        in_step: leave that to the optimiser's step, which saves reading them once more.

    Returns:
        The norm before clipping (scalar), the same in every process, and with `in_step` what the step has to divide by.
    """
    accelerator.unscale_gradients()
    norm = get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    if not in_step:
        clip_grads_with_norm_(model.parameters(), max_norm, norm)
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    # 1e-6 is that of torch's clipping.
    return norm, ((norm + 1e-6) / max_norm).clamp(min=1) if in_step else None


def local(parameter: Tensor) -> Tensor:
    """This process's part of a parameter; all of it when it is not sharded."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter
