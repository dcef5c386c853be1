"""Frozen image autoencoders of diffusers, AutoencoderKL (SD-VAE) and AutoencoderDC (DC-AE), behind one interface."""

import hashlib
import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tim.config import Model
from tim.models.hub import hub_options
from tim.models.network import traits_of

if TYPE_CHECKING:  # diffusers takes seconds to import, and runs on pixels or latents do without
    from diffusers.models import AutoencoderDC, AutoencoderKL


class Autoencoder:
    """latent = (z - shift) * scaling_factor; z is the DC-AE code or a sample of the KL posterior.

    Kind, factor, shift and scale are read from the loaded model.

    Args:
        model: an AutoencoderKL or AutoencoderDC.

    Attributes:
        factor: pixels per latent position along a side.
        channels: latent channels.
    """

    def __init__(self, model: "AutoencoderKL | AutoencoderDC") -> None:
        self.model = model.eval().requires_grad_(False)
        config = model.config
        self.factor, self.channels = _factor(config), config.latent_channels
        # AutoencoderDC knows no shift_factor; AutoencoderKL's is null unless the latents are not centred.
        self.scale, self.shift = config.scaling_factor, config.get("shift_factor") or 0.0

    @cached_property
    def identity(self) -> str:
        """Short hash of all that encoding and decoding depend on: kind, configuration, weights in their dtype."""
        known = {key: value for key, value in self.model.config.items() if not key.startswith("_")}
        digest = hashlib.sha256(json.dumps([type(self.model).__name__, known], sort_keys=True, default=str).encode())
        for name, weight in sorted(self.model.state_dict().items()):
            digest.update(name.encode())
            digest.update(weight.cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()[:16]

    @property
    def device(self) -> torch.device:
        """Where the model computes, which is not where its weights lie when accelerate's hooks move them for each call."""
        return getattr(getattr(self.model, "_hf_hook", None), "execution_device", None) or self.model.device

    @property
    def is_kl(self) -> bool:
        """Whether encoding draws from a posterior and therefore needs noise."""
        from diffusers.models import AutoencoderKL

        return isinstance(self.model, AutoencoderKL)

    @classmethod
    def from_pretrained(
        cls, vae_dir: str, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> "Autoencoder":
        """Load a diffusers folder or hub id; pipelines that keep it in the subfolder `vae` work too.

        Raises:
            ValueError: when nothing can be loaded from vae_dir.
        """
        kind, _, options = _read_config(vae_dir)
        try:
            return cls(kind.from_pretrained(vae_dir, torch_dtype=dtype, **options)).to(device=device)
        except (OSError, ValueError) as error:
            raise ValueError(f"model.vae_dir={vae_dir!r} is no autoencoder folder or hub id: {error}") from error

    @staticmethod
    def factor_of(vae_dir: str | None) -> int:
        """The factor of an autoencoder by its config alone, without its weights; 1 for none (pixels).

        Raises:
            ValueError: when there is no config in vae_dir.
        """
        return 1 if vae_dir is None else _factor(_read_config(vae_dir)[1])

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, h, w) of the latents of height x width pixels.

        Raises:
            ValueError: when a side is not a multiple of the factor; names the nearest that is.
        """
        for name, side in (("height", height), ("width", width)):
            if side % self.factor or side <= 0:
                below = max(self.factor, side // self.factor * self.factor)
                raise ValueError(
                    f"{name}={side} is not a multiple of {self.factor}; the nearest are {below} and {below + self.factor}"
                )
        return self.channels, height // self.factor, width // self.factor

    def set_tiling(self, above: int) -> None:
        """Encode and decode images with a side above `above` pixels in tiles of that side, to save memory.

        Tiles overlap by a quarter and are blended there. Each tile is normalised alone, so the result differs slightly
        from that of the whole image. Images up to `above` x `above` are not tiled.

        Raises:
            ValueError: when above is not a multiple of four times the factor, which the quarters need.
        """
        unit = 4 * self.factor
        if above % unit or above <= 0:
            below = max(unit, above // unit * unit)
            raise ValueError(
                f"images cannot be tiled above {above} pixels: this autoencoder's tiles are multiples of {unit}; "
                f"the nearest are {below} and {below + unit}"
            )
        if self.is_kl:  # its enable_tiling takes no sizes
            self.model.tile_sample_min_size, self.model.tile_latent_min_size = above, above // self.factor
            self.model.tile_overlap_factor = 0.25
            self.model.enable_tiling()
        else:
            self.model.enable_tiling(above, above, above * 3 // 4, above * 3 // 4)

    def configure(
        self, slicing: bool = False, tiling_above: int | None = None, compiled: bool = False, channels_last: bool = False
    ) -> None:
        """How to encode and decode from now on.

        Args:
            slicing: one image of a batch at a time, to save memory; the result is the same.
            tiling_above: see `set_tiling`.
            compiled: compile the decoder for any size (torch.compile); the first image then waits for the compiler.
            channels_last: keep weights and images with the channels last in memory, as the tensor cores of GPUs take them; the
                result differs by rounding.
        """
        if channels_last:
            self.model.to(memory_format=torch.channels_last)
        if slicing:
            self.model.enable_slicing()
        if tiling_above is not None:
            self.set_tiling(tiling_above)
        if compiled:
            self.model.decoder.compile(dynamic=True)

    def to(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> "Autoencoder":
        """Compute in another dtype or elsewhere. Weights once rounded to a lower precision stay rounded."""
        wanted = {"device": device, "dtype": dtype}
        self.model.to(**{key: value for key, value in wanted.items() if value is not None})  # diffusers warns of any dtype
        return self

    @torch.no_grad()
    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """(B, 3, H, W) in [-1, 1] to latents (B, C, h, w) float32; noise (same shape) picks the KL posterior sample."""
        images = images.to(self.device, self.model.dtype)
        if not self.is_kl:
            return (self.model.encode(images).latent.float() - self.shift) * self.scale
        posterior = self.model.encode(images).latent_dist
        # A sample, as in training of the released weights; by hand, so that it is a function of the caller's noise.
        noise = torch.randn_like(posterior.mean) if noise is None else noise.to(posterior.mean)
        return ((posterior.mean + posterior.std * noise).float() - self.shift) * self.scale

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) to images (B, 3, H, W) in about [-1, 1], float32."""
        # Unscaled in float32: only what the decoder itself computes is rounded to its dtype.
        z = latents.to(self.device, torch.float32) / self.scale + self.shift
        return self.model.decode(z.to(self.model.dtype)).sample.float()


def _read_config(vae_dir: str) -> "tuple[type[AutoencoderKL] | type[AutoencoderDC], dict[str, Any], dict[str, Any]]":
    """Class and config of a diffusers autoencoder, and keywords by which it is loaded.

    Raises:
        ValueError: when there is none in vae_dir.
    """
    from diffusers.models import AutoencoderDC, AutoencoderKL

    options: dict[str, Any] = {"subfolder": "vae" if (Path(vae_dir) / "vae" / "config.json").is_file() else None}
    kinds = {"AutoencoderKL": AutoencoderKL, "AutoencoderDC": AutoencoderDC}
    try:
        options |= hub_options(vae_dir)
        config, _ = AutoencoderKL.load_config(vae_dir, return_unused_kwargs=True, **options)
        name = config.get("_class_name")
        if name not in kinds:
            raise ValueError(f"its class is {name}, not AutoencoderKL or AutoencoderDC")
    except (OSError, ValueError) as error:
        raise ValueError(f"model.vae_dir={vae_dir!r} is no autoencoder folder or hub id: {error}") from error
    return kinds[name], config, options


def _factor(config: Mapping[str, Any]) -> int:
    """Every block but the first halves the sides."""
    return 2 ** (len(config.get("encoder_block_out_channels") or config["block_out_channels"]) - 1)


def pixels_per_token(model: Model) -> int:
    """Pixels per token along a side, by the configs alone: the autoencoder's factor times the network's patch size.

    Raises:
        ValueError: when there is no autoencoder in vae_dir.
    """
    return Autoencoder.factor_of(model.vae_dir) * traits_of(model.network).patch_size
