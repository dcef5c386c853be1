"""What trainer, sampler and checkpoints need of a network, and the one place that builds one."""

import os
from dataclasses import dataclass, fields
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tim.config import Target


class Network(Protocol):
    """F(x_t, t, r, condition): any `torch.nn.Module` with this forward pass can be trained and sampled.

    The config names its class (`model.network.target`), whose constructor must leave the weights initialised. What else a
    network may have, and what happens without:

    * attributes: see `NetworkTraits`.
    * forward keyword `jvp`, True in the passes that only serve dF/dt, and `attn_type`, 'vanilla_attn' under forward-mode AD:
      not passed to a network that does not take them.
    * forward keyword `tangents`: derivatives of x (m, C, H, W), t and r (m,) along the path for the last m samples. The pass
      then returns dF/dt (m, C, H, W), without gradient, after F. A network without it is differentiated in a pass of its own.
    * forward keyword `guidance` (B, 3): the scale w >= 1 of classifier-free guidance and the ends of the guided interval as
      fractions of T_max, for networks that say `guidance_input`; None stands for no guidance, (1, 0, 1).
    * forward keyword `return_zs` (return the REPA projection (B, N, z_dim) beside F) and `projector`, the layers that make
      it: needed with model.enc_dir alone, else neither trained nor kept in checkpoints.
    * `blocks`, the units of torch.compile: the whole network is compiled. `use_checkpoint`, set by FSDP's
      activation_checkpointing.
    * `caption_keys_values(y)`, what may replace the caption features y in all steps of a sampling run: y is passed as it is.
    """

    def __call__(self, x: Tensor, t: Tensor, r: Tensor, y: Tensor) -> Tensor:
        """F (B, C, H, W), in the dtype of the weights or wider.

        Args:
            x: state (B, C, H, W).
            t, r: c_noise of both times (B,), float32 or wider. t = r asks for the instantaneous prediction.
            y: condition (B, ...): int labels, num_classes being the null class; or caption features (B, M, cap_feat_dim),
                then with the further keyword y_mask, None or (B, M) bool, True for real tokens.
        """
        ...


@dataclass(frozen=True)
class NetworkTraits:
    """What a network says of itself by its attributes; the values here hold for what it does not have.

    Attributes:
        patch_size: latent positions per token along a side; sides must be multiples.
        in_channels: of latents; None takes any.
        input_size: side of the training latents, the default size of samples.
        num_classes: None stands for as many as the data has.
        class_dropout_prob: probability with which the trainer replaces a label by the null class; 0 means there is none.
        cap_feat_dim: width of caption features; None takes any.
        z_dim: width of the REPA projection; None has none.
        guidance_input: whether the forward pass has the keyword `guidance`.
    """

    patch_size: int = 1
    in_channels: int | None = None
    input_size: int | None = None
    num_classes: int | None = None
    class_dropout_prob: float = 0.0
    cap_feat_dim: int | None = None
    z_dim: int | None = None
    guidance_input: bool = False

    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of the training latents.

        Raises:
            ValueError: when the network does not say.
        """
        if self.in_channels is None or self.input_size is None:
            raise ValueError(
                "the network does not say what it is trained on: give it the attributes in_channels and input_size"
            )
        return self.in_channels, self.input_size, self.input_size

    def check_caption_width(self, width: int) -> None:
        """Raise ValueError unless caption features of this width fit."""
        if self.cap_feat_dim not in (None, width):
            raise ValueError(
                f"caption features are {width} wide, the network expects cap_feat_dim={self.cap_feat_dim}; "
                f"check model.text_encoder_dir, or train with model.network.params.cap_feat_dim={width}"
            )


def traits_of(network: Network | Target) -> NetworkTraits:
    """The traits of a network, or of the one that a config's target would build: its keywords and their defaults."""
    # Of a target by the signature of its constructor: large networks take long to build.
    names = [f.name for f in fields(NetworkTraits)]
    if isinstance(network, Target):
        values: dict[str, Any] = {name: network.argument(name) for name in names}
    else:
        values = {name: getattr(network, name, None) for name in names}
    return NetworkTraits(**{name: value for name, value in values.items() if value is not None})


def build_network(target: Target) -> nn.Module:
    """The network that a config names, freshly initialised, in float32 on the default device.

    Raises:
        ValueError: when the target is no `torch.nn.Module`, refuses its keywords, or is larger than this machine's memory.
    """
    if not issubclass(target.resolve(), nn.Module):
        raise ValueError(f"model.network.target={target.target!r} is no torch.nn.Module")
    # A network of one's own may compute with tensors where it is built.
    if torch.get_default_device().type != "meta" and not target.own_module:
        _check_size(target)
    network: nn.Module = target.build()
    return network


def _check_size(target: Target) -> None:
    """ValueError when the network's weights are larger than this machine's memory, which would take it down."""
    with torch.device("meta"):
        size = sum(p.nbytes for p in target.build().parameters())
    room = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if size > room:
        raise ValueError(
            f"model.network: the weights have {size / 1e9:.0f} GB, this machine's memory {room / 1e9:.0f} GB; check its params"
        )
