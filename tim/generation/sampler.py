"""A loaded model that draws images of any prompts or class labels, each a function of (seed, index, repetition)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from tim import rng
from tim.checkpoint.weights import Weights
from tim.config import Config
from tim.distributed import inference_dtype, set_tf32
from tim.generation.conditions import Conditions, Keywords, build_conditions
from tim.generation.settings import SampleSettings
from tim.images import to_uint8
from tim.models.autoencoders import Autoencoder
from tim.models.loading import load_strict
from tim.models.network import build_network, traits_of
from tim.schedulers.sampling import guided_steps, sample
from tim.schedulers.transports import Transport


@dataclass
class Sampler:
    """A loaded model ready to draw images: `load_sampler(...).draw(["a red fox in the snow"])`.

    Attributes:
        network: on `device`, in the dtype it samples in. vae: its autoencoder, None when the pixels are the latents.
        conditions: of captions or class labels, whichever the network was trained on.
    """

    settings: SampleSettings
    transport: Transport
    network: nn.Module
    vae: Autoencoder | None
    conditions: Conditions
    device: torch.device

    def at(self, settings: SampleSettings) -> "Sampler":
        """The same models under other settings.

        Raises:
            ValueError: for an impossible setting, or a size that the models cannot draw.
        """
        settings = replace(settings)
        settings.check(self.transport)
        factor, traits = self.vae.factor if self.vae else 1, traits_of(self.network)
        settings.height = settings.height or traits.latent_shape()[1] * factor
        settings.width = settings.width or traits.latent_shape()[2] * factor
        step = factor * traits.patch_size
        for flag, side in (("--height", settings.height), ("--width", settings.width)):
            if side <= 0 or side % step:
                below = max(0, side // step * step)
                near = f"{below} and {below + step}" if below else f"{step} and {2 * step}"
                raise ValueError(f"{flag} {side} is not a multiple of {step} (autoencoder x patch); the nearest are {near}")
        return replace(self, settings=settings)

    @property
    def guided(self) -> list[bool]:
        """Which steps are guided."""
        s, (T_max, T_min) = self.settings, self.settings.ends
        return guided_steps(self.transport.time_grid(s.num_steps, T_max, T_min).tolist(), T_max, *s.guidance())

    @property
    def nfe(self) -> int:
        """Network evaluations per image."""
        return self.settings.num_steps + sum(self.guided)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of the state."""
        height, width = self.settings.size
        if self.vae is not None:
            return self.vae.latent_shape(height, width)
        return traits_of(self.network).latent_shape()[0], height, width

    def draw(
        self,
        prompts: Sequence[str] | Sequence[int],
        indices: Sequence[int] | None = None,
        repetitions: Sequence[int] | None = None,
    ) -> tuple[np.ndarray, Tensor]:
        """One image of each prompt, a function of (prompt, seed, index, repetition).

        Args:
            prompts: B captions or class labels.
            indices: number of each image, 0 to B - 1 when None; repetitions: which image of that number, 0 when None.

        Returns:
            uint8 images (B, H, W, 3) and their latents (B, C, h, w) float32.

        Raises:
            ValueError: for what the network cannot be asked for.
        """
        indices = range(len(prompts)) if indices is None else indices
        latents = self.latents(indices, repetitions, *self.conditions(prompts, self.settings.cfg_scale > 1))
        return self.decode(latents), latents

    @torch.no_grad()
    def latents(
        self, indices: Sequence[int], repetitions: Sequence[int] | None, cond: Keywords, uncond: Keywords | None
    ) -> Tensor:
        """The transitions: latents (B, C, h, w) float32 of images `indices` under conditions of as many rows.

        Noise comes from one generator per image, the start first and the re-noising of each step after it.
        """
        s, shape = self.settings, self.latent_shape
        repetitions = [0] * len(indices) if repetitions is None else repetitions
        generators = [rng.generator(s.global_seed, "sample", j, k) for k, j in zip(indices, repetitions, strict=True)]

        def fresh(step: int = 0) -> Tensor:
            rows = np.stack([g.standard_normal(shape, dtype=np.float32) for g in generators])
            return torch.from_numpy(rows).to(self.device, non_blocking=True)

        scale, low, high, first = s.guidance()
        result = sample(
            self.transport, self.network, fresh(), cond, uncond, num_steps=s.num_steps, T_max=s.T_max, T_min=s.T_min,
            cfg_scale=scale, cfg_low=low, cfg_high=high, guide_first_step=first, stochasticity_ratio=s.stochasticity_ratio,
            sample_type=s.sample_type, noise_fn=fresh,
        )  # fmt: skip
        return result.x.float()

    def decode(self, latents: Tensor) -> np.ndarray:
        """uint8 images (B, H, W, 3) of latents."""
        return to_uint8(latents if self.vae is None else self.vae.decode(latents))


def load_sampler(config: Config, weights: Weights, settings: SampleSettings, device: torch.device) -> Sampler:
    """Load network, autoencoder and text encoder, and check the settings against them.

    Args:
        config: the one the weights were trained with.

    Raises:
        ValueError, FileNotFoundError: for weights of another network, an impossible size or setting.
    """
    transport = config.model.transport.build()
    replace(settings).check(transport)
    set_tf32(settings.tf32)
    dtype = network_dtype(config, settings.dtype, device)
    network = build_network(config.model.network).requires_grad_(False)
    load_strict(network, weights.read(), weights.source)
    network = network.to(device, dtype).eval()
    vae = None
    if config.model.vae_dir:
        vae = Autoencoder.from_pretrained(config.model.vae_dir, getattr(torch, settings.vae_dtype), device)
        vae.configure(settings.slice_vae, settings.tile_vae, settings.compile_vae)
    conditions = build_conditions(config, network, dtype, device)
    return Sampler(settings, transport, network, vae, conditions, device).at(settings)


def network_dtype(config: Config, wanted: str, device: torch.device) -> torch.dtype:
    """The dtype the network samples in."""
    return inference_dtype(config.training.mixed_precision, device) if wanted == "auto" else getattr(torch, wanted)
