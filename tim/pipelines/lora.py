"""LoRA in pipelines: diffusers' methods (`load_lora_weights`, `set_adapters`, `fuse_lora`), strict about what is loaded."""

from collections import defaultdict
from pathlib import Path
from typing import Any

from diffusers.loaders.lora_pipeline import SanaLoraLoaderMixin  # of pipelines whose transformer alone takes adapters
from safetensors import SafetensorError
from torch import Tensor, nn

from tim.checkpoint.adapters import LORA_FILE, PREFIX, SETTINGS


class LoraMixin(SanaLoraLoaderMixin):
    """What a pipeline can do with adapters."""

    transformer: nn.Module

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | Path | dict[str, Tensor],
        adapter_name: str | None = None,
        hotswap: bool = False,
        **kwargs: Any,
    ) -> None:
        """As that of diffusers, but nothing is loaded of adapters that do not fit.

        Args:
            pretrained_model_name_or_path_or_dict: file or folder of `pytorch_lora_weights.safetensors`, a hub id, or tensors.
            adapter_name: for `set_adapters`; numbered when None.

        Raises:
            ImportError: without peft.
            OSError: when there is no such file.
            ValueError: for adapters of another network, or a name that is taken.
        """
        source = pretrained_model_name_or_path_or_dict
        if not isinstance(source, dict):
            source = str(source)
            kwargs.setdefault("use_safetensors", True)  # no pickles
            if Path(source).exists():
                kwargs.setdefault("weight_name", LORA_FILE)  # on a hub it is looked for
            elif source.count("/") != 1:
                raise FileNotFoundError(f"there is no file or folder {source}, and a hub id has the form OWNER/NAME")
        try:
            state, metadata = self.lora_state_dict(source, return_lora_metadata=True, **kwargs)
        except SafetensorError as error:
            raise ValueError(f"{source} is damaged or no safetensors file: {error}") from error
        if metadata is not None:  # others may ask peft to change the base
            metadata = {key: value for key, value in metadata.items() if key.removeprefix(PREFIX) in SETTINGS}
        check_adapters(self.transformer, state, source if isinstance(source, str) else "the dictionary")
        own = getattr(self.transformer, "peft_config", {})
        if adapter_name in own and not hotswap:
            raise ValueError(f"`adapter_name`={adapter_name!r} is taken; loaded are {', '.join(own)}")
        super().load_lora_into_transformer(state, self.transformer, adapter_name, self, metadata=metadata, hotswap=hotswap)


def check_adapters(network: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Raise ValueError unless every adapter's layer is in the network, and of its size."""
    sizes = {name.replace(".base_layer", ""): p.shape for name, p in network.named_parameters()}
    wrong, ranks = [], defaultdict[str, dict[str, int]](dict)
    for key, value in state.items():
        name, _, kind = key.removeprefix(PREFIX).partition(".lora_")
        shape = sizes.get(f"{name}.weight")
        if kind in ("A.weight", "B.weight"):
            ranks[name][kind] = value.shape["AB".index(kind[0])]
        if not key.startswith(PREFIX) or not kind or shape is None:
            wrong.append(f"{key} belongs to no layer")
        elif kind == "A.weight" and value.shape[1] != shape[1]:
            wrong.append(f"{key} takes {value.shape[1]} inputs, the layer {shape[1]}")
        elif kind == "B.weight" and value.shape[0] != shape[0]:
            wrong.append(f"{key} gives {value.shape[0]} outputs, the layer {shape[0]}")
    unlike = [name for name, pair in ranks.items() if len(pair) != 2 or len(set(pair.values())) != 1]
    wrong += [f"{name} has no A and B of one rank" for name in unlike]
    if wrong or not state:
        said = f"{len(wrong)} of {len(state)} tensors do not fit, first: {'; '.join(wrong[:3])}" if wrong else "it is empty"
        raise ValueError(f"{source} holds no adapters of this network: {said}")
