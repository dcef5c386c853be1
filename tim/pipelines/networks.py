"""The networks as models of diffusers.

The classes are those that the trainer builds, with the mixins beside them: one implementation, one set of state-dict keys. They
are classes of their own because diffusers takes three times as long to import as torch, which training and sampling do without.
"""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.loaders.peft import PeftAdapterMixin
from diffusers.loaders.single_file_model import FromOriginalModelMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin  # for the loader of pipelines, which looks for it in this module
from torch import Tensor
from typing_extensions import Self

from tim.checkpoint.adapters import load_weights
from tim.checkpoint.weights import find_weights
from tim.config import Model, load_config
from tim.models.c2i.tim_model import TiM as ClassTiM
from tim.models.loading import load_strict
from tim.models.t2i.tim_model import TiM as TextTiM
from tim.models.trunk import TransitionTransformer
from tim.targets import check_keywords, constructor_keywords

# By the signature of the forward pass the objective sees what it may ask for.
_signed_alike: Any = functools.wraps(TransitionTransformer.forward, assigned=())


class _DiffusersModel(TransitionTransformer, ModelMixin, ConfigMixin, PeftAdapterMixin, FromOriginalModelMixin):
    """What makes a network a model of diffusers, before which it stands among the bases."""

    _supports_gradient_checkpointing = True
    _no_split_modules: ClassVar = ["Block"]
    _repeated_blocks: ClassVar = ["Block"]
    _keep_in_fp32_modules: ClassVar = ["t_embedder", "delta_embedder"]  # neighbouring times are one in half precision
    _skip_layerwise_casting_patterns: ClassVar = ["x_embedder", "norm"]

    def __init__(self, **kwargs: Any) -> None:
        defaults = {name: keyword.default for name, keyword in constructor_keywords(type(self)).items()}
        ConfigMixin.register_to_config(self, **defaults | kwargs)
        self._attention_backend: str | None = None
        super().__init__(**kwargs)

    @staticmethod
    def _get_init_keys(input_class: type) -> set[str]:
        """Keywords of the constructor, as `from_config` asks for them: those of the bases are hidden behind **kwargs."""
        return {"self", *constructor_keywords(input_class)}

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether the backward pass recomputes the activations of blocks."""
        return self.use_checkpoint

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, wanted: bool) -> None:
        self.use_checkpoint = wanted

    def set_attention_backend(self, backend: str) -> None:
        """Take one of diffusers' attention backends wherever a call names no `attn_type`."""
        super().set_attention_backend(backend)
        self._attention_backend = backend.lower()

    def reset_attention_backend(self) -> None:
        """Back to the best that serves the inputs."""
        super().reset_attention_backend()
        self._attention_backend = None

    @_signed_alike
    def forward(
        self,
        *args: Any,
        hidden_states: Tensor | None = None,
        timestep: Tensor | float | None = None,
        r_timestep: Tensor | float | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
        **kwargs: Any,
    ) -> Any:
        """F(x_t, t, r, y): by position as `TransitionTransformer.forward`, or by diffusers' names of the arguments.

        Args:
            hidden_states: x (B, C, H, W).
            timestep, r_timestep: c_noise of both times, one or (B,); without r_timestep the prediction is that at r = t.
            encoder_hidden_states: caption features (B, M, cap_feat_dim).
            encoder_attention_mask: (B, M), true or 1 for real tokens.
            class_labels: (B,), num_classes for the null class.
            return_dict: `Transformer2DModelOutput`, else a tuple; of a call by diffusers' names alone.
        """
        if self._attention_backend is not None and len(args) < 5:
            kwargs.setdefault("attn_type", self._attention_backend)
        if hidden_states is None:
            return super().forward(*args, **kwargs)
        r_timestep = timestep if r_timestep is None else r_timestep
        t, r = (torch.as_tensor(u, device=hidden_states.device).expand(hidden_states.shape[0]) for u in (timestep, r_timestep))
        if encoder_attention_mask is not None:
            kwargs["y_mask"] = encoder_attention_mask.bool()
        y: Any = encoder_hidden_states if class_labels is None else class_labels
        sample = super().forward(hidden_states, t, r, y, **kwargs)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Any:
        """As that of diffusers, but strict.

        Raises:
            ValueError: when keys are missing from the weights, or belong to another network.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        load = super().from_pretrained
        network, info = load(pretrained_model_name_or_path, output_loading_info=True, **kwargs)
        wrong = [f"{len(info[kind])} {kind}, first: {', '.join(map(str, list(info[kind])[:3]))}" for kind in info if info[kind]]
        if wrong:
            raise ValueError(f"{pretrained_model_name_or_path} belongs to another network than its config: {' | '.join(wrong)}")
        return (network, info) if wants_info else network

    @classmethod
    def from_single_file(
        cls,
        pretrained_model_link_or_path_or_dict: str | Path,
        config: str | Path | Mapping[str, Any] | None = None,
        torch_dtype: torch.dtype | None = None,
        weights: str | None = None,
    ) -> Self:
        """Read released weights, an export, a checkpoint or a training run; nothing in them is run.

        Of a run that trained adapters, these are put into the weights that they adapt.

        Args:
            pretrained_model_link_or_path_or_dict: what `tim.checkpoint.weights.find_weights` takes.
            config: YAML file of the run, a folder with a config.json, or the network's keywords.
            torch_dtype: of the weights, but the time embedders', which stay float32.
            weights: 'ema' or 'raw'; None takes the moving average when there is one.

        Raises:
            FileNotFoundError: when there are no weights or no config.
            ValueError: for a config of another class of network, or weights of another network.
        """
        found = find_weights(pretrained_model_link_or_path_or_dict, weights, name="weights")
        keywords, model = cls._keywords(config)
        network = cls(**keywords).requires_grad_(False)  # a projector that nothing trains may be missing
        if model is None:
            load_strict(network, found.read(), found.source)
        else:
            load_weights(network, found, model, merge=True)
        network.requires_grad_(True)
        return network.cast(torch_dtype).eval()

    def cast(self, dtype: torch.dtype | None) -> Self:
        """The weights in another dtype, but the time embedders', which become float32; as they are for None."""
        for name, child in self.named_children() if dtype is not None else ():
            child.to(torch.float32 if name in self._keep_in_fp32_modules else dtype)
        return self

    @classmethod
    def _keywords(cls, config: str | Path | Mapping[str, Any] | None) -> tuple[dict[str, Any], Model | None]:
        """The network's keywords, from where `from_single_file` may find them, and the YAML file's section when it is one."""
        if config is None:
            raise ValueError("config is missing: name the YAML file that the weights were trained with")
        if isinstance(config, Mapping) or Path(config).is_dir():
            found = config if isinstance(config, Mapping) else cls.load_config(config)
            keywords, model = {key: value for key, value in found.items() if not key.startswith("_")}, None
        else:
            model = load_config(config).model
            target = model.network
            if not issubclass(cls, target.resolve()):
                raise ValueError(f"{config} is of a {target.target}, not of a {cls.__name__}")
            keywords = target.params
        check_keywords(cls, keywords, "config")
        return keywords, model


class TiMTransformer2DModel(_DiffusersModel, TextTiM):
    """`tim.models.t2i.tim_model.TiM` as a model of diffusers."""


class TiMClassTransformer2DModel(_DiffusersModel, ClassTiM):
    """`tim.models.c2i.tim_model.TiM` as a model of diffusers."""
