"""Low-rank adapters (LoRA, arXiv 2106.09685) in a network, by peft: the base is frozen, the adapters are trained."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from tim.config import Lora
from tim.typed_yaml import nearest

TARGETS = ("qkv", "q", "kv", "proj", "fc1_g", "fc1_x", "fc2")  # of attention and MLP
APART = ("adaLN_modulation", "embedder", "projector")  # parts that have layers of these names too, and are meant by no default
ADAPTABLE = (nn.Linear, nn.Conv2d, nn.Embedding)


def add_adapters(network: nn.Module, lora: Lora) -> Any:
    """Freeze a network and put adapters into it, which leave its results as they are until they are trained.

    Args:
        network: with its weights, whose norms DoRA (arXiv 2402.09353) starts from.

    Returns:
        peft's LoraModel around the network, which can merge them.

    Raises:
        ValueError: when peft is not installed, or for layers that the network does not have.
    """
    try:
        from peft import LoraConfig, LoraModel
    except ImportError as error:
        raise ValueError("model.lora needs the package peft: pip install -e .[lora]") from error
    names = [name for name, _ in network.named_modules() if name]
    saved = [name for name in names if any(_ends(name, end) for end in lora.modules_to_save)]
    _check_found(lora.modules_to_save, names, "modules_to_save")
    layers = [name for name, module in network.named_modules() if isinstance(module, ADAPTABLE)]
    _check_found(lora.target_modules or (), layers, "target_modules")
    _check_found(lora.exclude_modules, layers, "exclude_modules")
    targets = [
        name
        for name in layers
        if any(_means(name, end) for end in lora.target_modules or TARGETS)
        and not any(_ends(name, end) for end in lora.exclude_modules)
        and not any(f"{name}.".startswith(f"{part}.") for part in saved)
    ]
    if not targets:
        raise ValueError("model.lora: no layer is left to adapt; check target_modules, exclude_modules and modules_to_save")
    _check_found(lora.rank_pattern, targets, "rank_pattern")  # peft takes them for regular expressions
    _check_found(lora.alpha_pattern, targets, "alpha_pattern")
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha or lora.rank,
        target_modules=targets,
        modules_to_save=lora.modules_to_save or None,
        use_dora=lora.use_dora,
        use_rslora=lora.use_rslora,
        lora_bias=lora.lora_bias,
        init_lora_weights=lora.init_lora_weights,
        rank_pattern=lora.rank_pattern,
        alpha_pattern=lora.alpha_pattern,
    )
    return LoraModel(network, config, "default")


def has_adapters(network: nn.Module) -> bool:
    """Whether `add_adapters` was here."""
    return hasattr(network, "peft_config")


def is_adapter_key(key: str) -> bool:
    """Whether an entry of the state dict of a network with adapters is of an adapter, or of a part that is trained whole."""
    return any(part.startswith("lora_") or part == "modules_to_save" for part in key.split("."))


def _ends(name: str, end: str) -> bool:
    return f".{name}".endswith(f".{end}")


def _means(name: str, end: str) -> bool:
    """Whether an entry of target_modules means a layer; a bare name means none of `APART`."""
    return _ends(name, end) and ("." in end or not any(part in name for part in APART))


def _check_found(ends: Iterable[str], names: list[str], key: str) -> None:
    """ValueError for the first entry that no name ends with."""
    for end in ends:
        if not any(_ends(name, end) for name in names):
            raise ValueError(
                f"model.lora.{key}: the network has no {end!r}{nearest(end, {n.rpartition('.')[2] for n in names})}"
            )
