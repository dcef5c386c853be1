"""Weights of a run that trains adapters: what they adapt, both in one network, and diffusers' file of them."""

import json
from pathlib import Path

from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from tim.checkpoint.weights import Weights, find_weights
from tim.config import Model
from tim.files import replacing
from tim.models.adapters import add_adapters
from tim.models.loading import load_strict

LORA_FILE = "pytorch_lora_weights.safetensors"  # as diffusers calls it
PREFIX = "transformer."  # what pipelines call the network
# What the file says of them, as peft calls it.
SETTINGS = ("r", "lora_alpha", "target_modules", "use_dora", "use_rslora", "lora_bias", "rank_pattern", "alpha_pattern")


def find_base(model: Model) -> Weights:
    """The weights that a config's adapters are on; raises as `find_weights`."""
    assert model.ckpt is not None, "checked with the config"
    return find_weights(model.ckpt, name="model.ckpt")


def load_weights(network: nn.Module, weights: Weights, model: Model, merge: bool = False) -> None:
    """Load weights into a new network, strictly; those of adapters with what they adapt.

    Args:
        network: of the config, freshly built.
        model: section of the config that the weights were trained with.
        merge: put adapters into the weights, so that the network is a plain one.

    Raises:
        FileNotFoundError: when the weights that adapters are on are not there.
        ValueError: for weights of another network, or adapters of other weights.
    """
    if model.lora is None:
        load_strict(network, weights.read(), weights.source)
        return
    base, recorded = find_base(model), weights.base()
    if recorded not in (None, base.digest()):
        raise ValueError(
            f"{weights.source} adapts other weights than those of model.ckpt={model.ckpt}: their sha256 was {recorded}, "
            f"here it is {base.digest()}; name the file that the adapters were trained on"
        )
    load_strict(network, base.read(), base.source)
    adapted = add_adapters(network, model.lora)
    load_strict(network, weights.read(), weights.source)
    network.requires_grad_(False)
    if merge:
        adapted.merge_and_unload()
        vars(network).pop("peft_config", None)  # which older versions of peft leave


def write_lora(network: nn.Module, path: Path) -> None:
    """Write a network's adapters as the file that `load_lora_weights` of pipelines takes. Collective for a sharded network.

    Raises:
        ValueError: when parts of the network were trained whole, for which the format has no place.
    """
    from peft import get_peft_model_state_dict

    config = vars(network)["peft_config"]["default"].to_dict()
    if config["modules_to_save"]:
        raise ValueError(
            f"model.lora.modules_to_save={config['modules_to_save']} were trained whole, for which a file of adapters has no "
            "place; tools/convert_to_diffusers.py RUN FOLDER makes a pipeline that has everything in its weights"
        )
    known = {f"{PREFIX}{key}": sorted(config[key]) if key == "target_modules" else config[key] for key in SETTINGS}
    whole = get_model_state_dict(network, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if not whole:
        return  # the first process has everything
    adapters = get_peft_model_state_dict(network, state_dict=whole)
    state = {f"{PREFIX}{key}": value.contiguous() for key, value in adapters.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        save_file(state, partial, {"format": "pt", "lora_adapter_metadata": json.dumps(known, sort_keys=True)})
