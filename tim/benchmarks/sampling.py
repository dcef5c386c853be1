"""Where the time of sampling goes: text, network, decoding, each apart."""

import copy
import math
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, TypeAlias

import numpy as np
import torch
from diffusers import AutoencoderDC, AutoencoderKL
from torch import Tensor
from transformers import Gemma3TextConfig, Gemma3TextModel, PreTrainedModel

from tim.benchmarks.measure import Results, count_flops, reset_peak_memory, step_results, timed, times
from tim.config import Config
from tim.distributed import set_tf32
from tim.generation.conditions import CaptionConditions, Keywords, build_conditions
from tim.generation.sampler import Sampler, network_dtype
from tim.generation.settings import SampleSettings
from tim.images import save_image
from tim.models.autoencoders import Autoencoder
from tim.models.network import build_network, traits_of
from tim.models.text_encoders import load_model
from tim.schedulers.sampling import join_conditions
from tim.training.compilation import compile_network, eager_blocks
from tim.typed_yaml import read_tree

ARCHITECTURES = read_tree(Path(__file__).with_name("architectures.yaml"))
CALLS = 3  # of the network, whose median stands for all calls of a run
Calls: TypeAlias = list[tuple[int, Callable[[], Any]]]
AUTOENCODERS = {"dc-ae-f32c32": AutoencoderDC, "sd-vae": AutoencoderKL}


class TokenEncoder:
    """A text encoder fed with random tokens instead of captions: caption k has `tokens` of them, the empty one has one."""

    padding, identity = "mask", "random tokens"

    def __init__(self, model: PreTrainedModel, tokens: int) -> None:
        self.model, self.tokens, self.width = model, tokens, model.config.hidden_size

    @torch.no_grad()
    def __call__(self, captions: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        """Features (B, tokens, width), and no mask: all captions are equally long."""
        length = self.tokens if captions[0] else 1
        ids = torch.randint(3, self.model.config.vocab_size, (len(captions), length), device=self.model.device)
        return self.model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state, None


def random_sampler(config: Config, settings: SampleSettings, device: torch.device, tokens: int) -> Sampler:
    """The sampler of a config with small random weights; `identity` tells which of its companions are random too.

    Args:
        tokens: length of every caption.
    """
    set_tf32(settings.tf32)
    dtype = network_dtype(config, settings.dtype, device)
    encoder_folder, vae_folder = config.model.text_encoder_dir, config.model.vae_dir
    encoder = load_encoder(encoder_folder, dtype, device, tokens) if encoder_folder else None
    vae = load_vae(vae_folder, getattr(torch, settings.vae_dtype), device) if vae_folder else None
    if vae is not None:
        vae.configure(settings.slice_vae, settings.tile_vae, settings.compile_vae, settings.channels_last_vae)
    network = build_network(config.model.network).to(device, dtype).eval().requires_grad_(False)
    with torch.no_grad():  # a fresh network predicts zero; small weights keep the arithmetic like a trained one's
        for p in network.parameters():
            p.normal_(std=0.02)
    if config.training.compile:
        compile_network(network)
    companions = {"text encoder": encoder_folder, "autoencoder": vae_folder}
    random_weights = ["network", *(name for name, folder in companions.items() if folder and not Path(folder).is_dir())]
    identity = {"tokens": tokens if encoder else None, "random_weights": ", ".join(random_weights)}
    conditions = build_conditions(config, network, dtype, device) if encoder is None else CaptionConditions(encoder, network)
    return Sampler(settings, config.model.transport.build(), network, vae, conditions, device, identity).at(settings)


def bench_sample(config: Config, sampler: Sampler, batch_size: int, repeats: int, warmup: int, psnr: bool = False) -> Results:
    """Time text encoder, network and decoder on one batch of different prompts, or of classes.

    Args:
        sampler: from `random_sampler`, under the settings to measure.
        psnr: also compare decoding in bfloat16 with float32.

    Returns:
        A step is the batch. Milliseconds per image of each phase. `write_ms` is beside them: one thread's time for a file, of
        which a run has several while the next batch is drawn. `sampler_overhead` is the sampling loop over the sum of its
        network calls, minus one; `psnr_db` that of images decoded in half precision.
    """
    device, settings = sampler.device, sampler.settings
    classes = traits_of(sampler.network).num_classes or 1
    is_text, numbers = sampler.identity["tokens"] is not None, count()
    warmup = max(warmup, int(bool(config.training.compile)))

    def encode() -> tuple[Keywords, Keywords | None]:
        fresh = [next(numbers) for _ in range(batch_size)]  # prompts of the batch before would not be encoded again
        prompts = [f"prompt {k}" for k in fresh] if is_text else [k % classes for k in fresh]
        return sampler.conditions(prompts, settings.cfg_scale > 1)

    cond, uncond = encode()
    calls = network_calls(sampler, batch_size, cond, uncond)
    with eager_blocks(bool(config.training.compile)):
        flops = sum(number * count_flops(call) for number, call in calls)

    def draw() -> Tensor:
        return sampler.latents(range(batch_size), None, cond, uncond)

    reset_peak_memory(device)
    warmup_seconds = sum(times(draw, device, warmup)[0])
    phases = {"text": timed(encode, device, repeats, warmup)[0]}
    phases["network"], x, overhead = time_network(draw, calls, device, repeats)
    phases["decode"], (pixels, _) = timed(lambda: sampler.decode(x), device, repeats, warmup)
    total = sum(phases.values())
    height, width = settings.size
    return {
        "what": "sample",
        **step_results(config, device, batch_size, total, flops, sampler.nfe),
        "network_dtype": str(next(sampler.network.parameters()).dtype).removeprefix("torch."),
        "vae_dtype": settings.vae_dtype,
        "height": height,
        "width": width,
        "num_steps": settings.num_steps,
        **{f"{name}_ms": 1e3 * seconds / batch_size for name, seconds in phases.items()},
        **{f"{name}_share": seconds / total for name, seconds in phases.items()},
        "warmup_seconds": warmup_seconds,
        "write_ms": 1e3 * write_seconds(pixels.cpu().numpy(), settings.png_level, repeats, warmup) / batch_size,
        "sampler_overhead": overhead,
        "psnr_db": decode_psnr(sampler.vae, x) if psnr and sampler.vae is not None else None,
        **sampler.identity,
    }


def time_network(draw: Callable[[], Tensor], calls: Calls, device: torch.device, repeats: int) -> tuple[float, Tensor, float]:
    """Seconds of a sampling run, the latents it drew, and its overhead over the network calls alone.

    Run and calls are timed in turn, because a busy machine changes its pace.
    """
    runs, ratios = [], []
    for _ in range(repeats):
        seconds, x = timed(draw, device, 1, 0)
        runs.append(seconds)
        ratios.append(seconds / sum(number * timed(call, device, CALLS, 0)[0] for number, call in calls))
    return median(runs), x, median(ratios) - 1


def network_calls(sampler: Sampler, batch_size: int, cond: Keywords, uncond: Keywords | None) -> Calls:
    """How often a sampling run makes each kind of network call: a guided step makes one of twice the batch if it can."""
    network, steps = sampler.network, sampler.plan.steps
    guided = sum(step.is_guided for step in steps)
    state = torch.randn(batch_size, *sampler.latent_shape, device=sampler.device, dtype=next(network.parameters()).dtype)

    def call(batch: Tensor, condition: Keywords) -> Callable[[], Any]:
        t = torch.full((len(batch),), 0.5, device=batch.device)
        return torch.no_grad()(lambda: network(batch, t, t / 2, **condition))

    calls = [(len(steps) - guided, call(state, cond))]
    both = None if uncond is None else join_conditions(cond, uncond)
    if both is not None:
        calls.append((guided, call(torch.cat([state, state]), both)))
    elif uncond is not None:  # captions of another length than the empty one's
        calls += [(guided, call(state, cond)), (guided, call(state, uncond))]
    return [(number, each) for number, each in calls if number]


def write_seconds(pixels: np.ndarray, png_level: int, repeats: int, warmup: int) -> float:
    """Seconds in which one thread writes images (B, H, W, 3) uint8 as .png files."""
    with TemporaryDirectory() as folder:

        def write() -> None:
            for k, image in enumerate(pixels):
                save_image(Path(folder) / f"{k}.png", image, png_level)

        return timed(write, torch.device("cpu"), repeats, warmup)[0]


def decode_psnr(vae: Autoencoder, x: Tensor) -> float:
    """PSNR in dB of images decoded in bfloat16 against float32, both as uint8 levels."""
    single = vae.to(torch.float32).decode(x)
    half = Autoencoder(copy.deepcopy(vae.model).to(torch.bfloat16)).decode(x)
    return psnr(half, single)


def psnr(images: Tensor, reference: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of images in [-1, 1] taken together; 166 where they are equal."""
    error = (images.clamp(-1, 1).double() - reference.clamp(-1, 1).double()).square().mean().item()
    return 10 * math.log10(4 / max(error, 1e-16))


def load_encoder(folder: str, dtype: torch.dtype, device: torch.device, tokens: int) -> TokenEncoder:
    """The text encoder in a folder, or Gemma-3-1b's architecture with random weights."""
    if Path(folder).is_dir():
        return TokenEncoder(load_model(folder, dtype).to(device).eval(), tokens)
    if folder not in ARCHITECTURES:
        raise ValueError(f"model.text_encoder_dir={folder!r} is no folder; use one, or google/gemma-3-1b-it")
    with torch.device(device):
        model = Gemma3TextModel(Gemma3TextConfig(**ARCHITECTURES[folder]))
    return TokenEncoder(model.to(dtype).eval(), tokens)


def load_vae(folder: str, dtype: torch.dtype, device: torch.device) -> Autoencoder:
    """The autoencoder in a folder, or a published architecture with random weights."""
    if Path(folder).is_dir():
        return Autoencoder.from_pretrained(folder, dtype, device)
    for name, kind in AUTOENCODERS.items():
        if name in folder:
            wanted = None if dtype is torch.float32 else dtype  # which it has, and would be warned of
            return Autoencoder(kind(**ARCHITECTURES[name])).to(wanted, device)
    raise ValueError(f"model.vae_dir={folder!r} is no folder; speed can be measured with one, a DC-AE f32c32 or an SD-VAE id")
