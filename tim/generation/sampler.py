"""A loaded model that draws images of any prompts or class labels, each a function of (seed, index, repetition)."""

import json
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tim import rng
from tim.checkpoint.adapters import find_base, load_weights
from tim.checkpoint.weights import BASE, Weights
from tim.config import Config
from tim.distributed import inference_dtype, set_tf32, to_device
from tim.generation.conditions import Conditions, Keywords, build_conditions
from tim.generation.settings import SampleSettings
from tim.images import to_pixels
from tim.models.autoencoders import Autoencoder
from tim.models.network import build_network, traits_of
from tim.schedulers.sampling import Plan, follow, plan_steps
from tim.schedulers.transport import Transport
from tim.training.compilation import compile_network

PUBLISHED = {  # weights, and the config that they belong to
    "c2i_model_256": "configs/c2i/tim_xl_p2_256.yaml",
    "c2i_model_512": "configs/c2i/tim_xl_p1_512.yaml",
    "t2i_model": "configs/t2i/tim_xl_p1_t2i.yaml",
}


@dataclass
class Sampler:
    """A loaded model ready to draw images: `load_sampler(...).draw(["a red fox in the snow"])`.

    Attributes:
        network: on `device`, in the dtype it samples in. vae: its autoencoder, None when the pixels are the latents.
        conditions: of captions or class labels, whichever the network was trained on.
        identity: class and keywords of network and transport, which decide images together with the weights.
    """

    settings: SampleSettings
    transport: Transport
    network: nn.Module
    vae: Autoencoder | None
    conditions: Conditions
    device: torch.device
    identity: dict[str, Any] = field(default_factory=dict)

    def at(self, settings: SampleSettings) -> "Sampler":
        """The same models under other settings.

        Raises:
            ValueError: for an impossible setting, or a size that the models cannot draw.
        """
        settings = replace(settings)
        settings.check(self.transport)
        (T_max, T_min), trained = settings.ends, self.transport
        if T_max > trained.T_max or T_min < trained.T_min:
            kind = f"{type(trained).__name__} was trained on [{trained.T_min}, {trained.T_max}]"
            warnings.warn(f"--T-min {T_min} to --T-max {T_max} go beyond the times that {kind}", stacklevel=2)
        factor, traits = self.vae.factor if self.vae else 1, traits_of(self.network)
        if settings.height is None:
            settings.height = traits.latent_shape()[1] * factor
        if settings.width is None:
            settings.width = traits.latent_shape()[2] * factor
        step = factor * traits.patch_size
        for flag, side in (("--height", settings.height), ("--width", settings.width)):
            if side % step:
                below = max(0, side // step * step)
                near = f"{below} and {below + step}" if below else f"{step} and {2 * step}"
                raise ValueError(f"{flag} {side} is not a multiple of {step} (autoencoder x patch); the nearest are {near}")
        if settings.guidance_input is not None and not traits.guidance_input:
            raise ValueError(
                f"--guidance-input {settings.guidance_input} needs a network that was trained with guidance_input: true; guide "
                "this one by --cfg-scale"
            )
        sampler = replace(self, settings=settings)
        _ = sampler.plan  # made now, so that an impossible grid is refused before anything is drawn
        return sampler

    @cached_property
    def plan(self) -> Plan:
        """The steps, the same for every batch."""
        s = self.settings
        scale, low, high, first = s.guidance()
        return plan_steps(
            self.transport, self.device, num_steps=s.num_steps, T_max=s.T_max, T_min=s.T_min, cfg_scale=scale, cfg_low=low,
            cfg_high=high, guide_first_step=first, stochasticity_ratio=s.stochasticity_ratio, sample_type=s.sample_type,
        )  # fmt: skip

    @property
    def nfe(self) -> int:
        """Network evaluations per image."""
        return self.plan.nfe

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
            ValueError: for what the network cannot be asked for, or images that are not finite.
        """
        indices = range(len(prompts)) if indices is None else indices
        drawn = self.launch(prompts, indices, repetitions).wait()
        if not drawn.finite.all():
            names = [f"index {k}" for k, good in zip(indices, drawn.finite.tolist(), strict=True) if not good]
            raise ValueError(not_finite(names, len(drawn.finite)))
        return drawn.images.numpy(), drawn.latents.to(self.device)

    def launch(
        self, prompts: Sequence[str] | Sequence[int], indices: Sequence[int], repetitions: Sequence[int] | None = None
    ) -> "Drawn":
        """As `draw`, but images that are not finite raise nothing, and a GPU may still be at work on all of them."""
        latents = self.latents(indices, repetitions, *self.conditions(prompts, self.settings.cfg_scale > 1))
        is_cuda = self.device.type == "cuda"
        images, finite, latents = (x.to("cpu", non_blocking=is_cuda) for x in (*self.decode(latents), latents))
        if not is_cuda:
            return Drawn(images, finite, latents)
        arrived = torch.cuda.Event()
        arrived.record()
        return Drawn(images, finite, latents, arrived)

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
            return to_device(torch.from_numpy(rows), self.device)

        if s.guidance_input is not None:
            guidance = torch.tensor([s.guidance_input, s.guidance_low, s.guidance_high])
            cond = {**cond, "guidance": to_device(guidance, self.device).expand(len(indices), 3)}
        return follow(self.plan, self.network, fresh(), cond, uncond, noise_fn=fresh).x.float()

    def decode(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 images (B, H, W, 3) of latents, and bools (B,) that say which of them are finite; both on the device."""
        x = latents if self.vae is None else self.vae.decode(latents)
        return to_pixels(x, truncate=self.settings.uint8 == "truncate"), x.flatten(1).isfinite().all(1)


@dataclass
class Drawn:
    """Images of a batch on the host, or on their way to it.

    Attributes:
        images: uint8 (B, H, W, 3); those that are not finite mean nothing.
        finite: bools (B,).
        latents: (B, C, h, w) float32.
        ready: when all have arrived; None when they have.
    """

    images: Tensor
    finite: Tensor
    latents: Tensor
    ready: torch.cuda.Event | None = None

    def wait(self) -> "Drawn":
        """Return when everything has arrived."""
        if self.ready is not None:
            self.ready.synchronize()
        return self


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
    try:
        load_weights(network, weights, config.model)
    except ValueError as error:
        theirs = PUBLISHED.get(weights.source.stem)
        slip = f"; {weights.source.name} belongs to {theirs} (the published 512x512 script names the 256 file by mistake)"
        raise ValueError(f"{error}{slip if theirs else ''}") from error
    largest = config.model.transition_loss.get("guidance_max")
    if settings.guidance_input is not None and largest is not None and settings.guidance_input > largest:
        warnings.warn(
            f"--guidance-input {settings.guidance_input} goes beyond guidance_max={largest} of training", stacklevel=2
        )
    network = network.to(device, dtype).eval()
    if settings.compile:
        compile_network(network)
    vae = None
    if config.model.vae_dir:
        vae = Autoencoder.from_pretrained(config.model.vae_dir, getattr(torch, settings.vae_dtype), device)
        vae.configure(settings.slice_vae, settings.tile_vae, settings.compile_vae, settings.channels_last_vae)
    elif settings.slice_vae or settings.tile_vae or settings.compile_vae or settings.channels_last_vae:
        flags = "--slice_vae, --tile-vae, --compile-vae and --channels-last-vae"
        warnings.warn(f"{flags} have no effect: the model has no autoencoder", stacklevel=2)
    conditions = build_conditions(config, network, dtype, device)
    return Sampler(settings, transport, network, vae, conditions, device, _identity(config, dtype)).at(settings)


def _identity(config: Config, dtype: torch.dtype) -> dict[str, Any]:
    """Classes of network and transport with all keywords, so that an error can name the one that differs."""
    found: dict[str, Any] = {"network.dtype": str(dtype)}
    for part, target in (("network", config.model.network), ("transport", config.model.transport)):
        found |= {part: target.target, **{f"{part}.{name}": value for name, value in sorted(target.keywords().items())}}
    if config.model.lora is not None:  # weights_sha256 is that of the adapters alone
        found |= {"lora": asdict(config.model.lora), BASE: find_base(config.model).digest()}
    return json.loads(json.dumps(found, default=str))


def not_finite(names: Sequence[str], total: int) -> str:
    """What to say of images that hold NaN or infinity.

    Args:
        names: of them. total: how many were drawn.
    """
    shown = ", ".join([*names[:5], *["..."] * (len(names) > 5)])
    remedy = "check the weights, or try --dtype float32 and --vae-dtype float32"
    return f"{len(names)} of {total} images are not finite (NaN or infinity): {shown}; {remedy}"


def network_dtype(config: Config, wanted: str, device: torch.device) -> torch.dtype:
    """The dtype the network samples in."""
    return inference_dtype(config.training.mixed_precision, device) if wanted == "auto" else getattr(torch, wanted)
