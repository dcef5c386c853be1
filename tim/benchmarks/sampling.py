"""Where the time of text-to-image sampling goes: text, network, decoding, each apart."""

import copy
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tim.benchmarks.measure import Report, best_device, device_name, peak_memory, timed
from tim.config import Config
from tim.distributed import set_tf32
from tim.generation.captions import CaptionConditions
from tim.generation.engine import Sampler, network_dtype
from tim.generation.settings import SampleSettings
from tim.models.autoencoders import Autoencoder
from tim.models.network import build_network
from tim.schedulers.sampling import guided_steps, join_conditions

# Architectures of the published companions; speed does not depend on weights, so random ones do without a download.
GEMMA_3_1B = dict(
    vocab_size=262144, hidden_size=1152, intermediate_size=6912, num_hidden_layers=26, num_attention_heads=4,
    num_key_value_heads=1, head_dim=256, sliding_window=512,
)  # fmt: skip
DC_AE_F32C32 = dict(
    encoder_block_types=("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
    decoder_block_types=("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
    upsample_block_type="interpolate", downsample_block_type="Conv", scaling_factor=0.41407,
)  # fmt: skip
SD_VAE = dict(
    block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4, sample_size=256,
    down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
)  # fmt: skip


@dataclass
class PhaseMeasurement(Report):
    """Milliseconds per image of each phase, medians. `sampler_overhead`: the sampling loop over the sum of its network
    calls, minus one. `psnr_db`: decoded pictures in half precision against float32."""

    device: str
    network_dtype: str
    vae_dtype: str
    height: int
    width: int
    batch_size: int
    tokens: int
    num_steps: int
    nfe: int
    text_ms: float
    network_ms: float
    decode_ms: float
    text_share: float
    network_share: float
    decode_share: float
    images_per_second: float
    sampler_overhead: float
    peak_memory_gib: float
    random_weights: str
    psnr_db: float | None = None
    torch: str = torch.__version__
    python: str = platform.python_version()


class TokenEncoder:
    """A text encoder fed with random tokens instead of captions: caption k has `tokens` of them, the empty one has one."""

    padding = "mask"

    def __init__(self, model: torch.nn.Module, tokens: int) -> None:
        self.model, self.tokens, self.width = model, tokens, model.config.hidden_size

    @torch.no_grad()
    def __call__(self, captions: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        """Features (B, tokens, width), and no mask: all captions are equally long."""
        length = self.tokens if captions[0] else 1
        ids = torch.randint(3, self.model.config.vocab_size, (len(captions), length), device=self.model.device)
        return self.model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state, None


def bench_phases(
    config: Config, settings: SampleSettings, batch_size: int, repeats: int, warmup: int, tokens: int, psnr: bool = False
) -> PhaseMeasurement:
    """Time text encoder, network and decoder on one batch of different prompts.

    Args:
        settings: size, steps, guidance and precisions.
        tokens: length of every caption.
        psnr: also compare decoding in bfloat16 with float32.
    """
    device = best_device()
    set_tf32(settings.tf32)
    dtype = network_dtype(config, settings.dtype, device)
    encoder, text_random = load_encoder(config, dtype, device, tokens)
    vae, vae_random = load_vae(config, getattr(torch, settings.vae_dtype), device)
    network = build_network(config.model.network).to(device, dtype).eval().requires_grad_(False)
    with torch.no_grad():  # a fresh network predicts zero; small weights keep the arithmetic like a trained one's
        for p in network.parameters():
            p.normal_(std=0.02)
    if vae is not None:
        vae.configure(settings.slice_vae, settings.tile_vae, settings.compile_vae)
    prompts = [f"prompt {k}" for k in range(batch_size)]
    indices = range(batch_size)
    conditions = CaptionConditions(prompts, encoder, network, guided=settings.cfg_scale > 1)
    sampler = Sampler(settings, config.model.transport.build(), network, vae, conditions, device).at(settings)

    def text() -> tuple[dict, dict | None]:
        conditions.last = None
        return conditions(indices)

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    text_seconds, (cond, uncond) = timed(text, device, repeats, warmup)
    network_seconds, x = timed(lambda: sampler.latents(indices, None, cond, uncond), device, repeats, warmup)
    decode_seconds, _ = timed(lambda: sampler.decode(x), device, repeats, warmup)
    calls = call_seconds(sampler, x, cond, uncond, repeats, warmup)
    total = text_seconds + network_seconds + decode_seconds
    return PhaseMeasurement(
        device=device_name(device),
        network_dtype=str(dtype).removeprefix("torch."),
        vae_dtype=settings.vae_dtype,
        height=sampler.settings.height,
        width=sampler.settings.width,
        batch_size=batch_size,
        tokens=tokens,
        num_steps=settings.num_steps,
        nfe=sampler.nfe,
        text_ms=1e3 * text_seconds / batch_size,
        network_ms=1e3 * network_seconds / batch_size,
        decode_ms=1e3 * decode_seconds / batch_size,
        text_share=text_seconds / total,
        network_share=network_seconds / total,
        decode_share=decode_seconds / total,
        images_per_second=batch_size / total,
        sampler_overhead=network_seconds / calls - 1,
        peak_memory_gib=peak_memory(device),
        random_weights=", ".join(["network", *(["text encoder"] * text_random), *(["autoencoder"] * vae_random)]),
        psnr_db=decode_psnr(vae, x) if psnr and vae is not None else None,
    )


@torch.no_grad()
def call_seconds(sampler: Sampler, x: Tensor, cond: dict, uncond: dict | None, repeats: int, warmup: int) -> float:
    """Seconds of the network calls of one sampling run alone, guided steps as one call of twice the batch."""
    s, network = sampler.settings, sampler.network
    grid = sampler.transport.time_grid(s.num_steps, s.T_max, s.T_min).tolist()
    guided = sum(guided_steps(grid, s.T_max, *s.guidance()))
    state = x.to(next(network.parameters()).dtype)

    def call(batch: Tensor, condition: dict) -> Callable[[], Any]:
        t = torch.full((len(batch),), 0.5, device=batch.device)
        return lambda: network(batch, t, t / 2, **condition)

    seconds = 0.0
    if guided:
        both = torch.cat([state, state])
        seconds += guided * timed(call(both, join_conditions(cond, uncond)), x.device, repeats, warmup)[0]
    if guided < s.num_steps:
        seconds += (s.num_steps - guided) * timed(call(state, cond), x.device, repeats, warmup)[0]
    return seconds


def decode_psnr(vae: Autoencoder, x: Tensor) -> float:
    """PSNR in dB of pictures decoded in bfloat16 against float32, both as uint8 levels."""
    single = vae.to(torch.float32).decode(x)
    half = Autoencoder(copy.deepcopy(vae.model).to(torch.bfloat16)).decode(x)
    single, half = (images.clamp(-1, 1).double() * 127.5 for images in (single, half))
    error = (single - half).square().mean().item()
    return float(10 * np.log10(255**2 / max(error, 1e-12)))


def load_encoder(config: Config, dtype: torch.dtype, device: torch.device, tokens: int) -> tuple[TokenEncoder, bool]:
    """The config's text encoder from its folder, or Gemma-3-1b's architecture with random weights; and which it is."""
    from transformers import Gemma3TextConfig, Gemma3TextModel

    from tim.models.text_encoders import load_model

    folder = config.model.text_encoder_dir
    if folder and Path(folder).is_dir():
        return TokenEncoder(load_model(folder, dtype).to(device).eval(), tokens), False
    if folder != "google/gemma-3-1b-it":
        raise ValueError(f"model.text_encoder_dir={folder!r} is no folder; use one, or google/gemma-3-1b-it")
    with torch.device(device):
        model = Gemma3TextModel(Gemma3TextConfig(**GEMMA_3_1B, use_cache=False)).to(dtype).eval()
    return TokenEncoder(model, tokens), True


def load_vae(config: Config, dtype: torch.dtype, device: torch.device) -> tuple[Autoencoder | None, bool]:
    """The config's autoencoder from its folder, or the published architecture with random weights; and which it is."""
    from diffusers import AutoencoderDC, AutoencoderKL

    folder = config.model.vae_dir
    if not folder:
        return None, False
    if Path(folder).is_dir():
        return Autoencoder.from_pretrained(folder, dtype, device), False
    if "dc-ae-f32c32" in folder:
        return Autoencoder(AutoencoderDC(**DC_AE_F32C32).to(device, dtype)), True
    if "sd-vae" in folder:
        return Autoencoder(AutoencoderKL(**SD_VAE).to(device, dtype)), True
    raise ValueError(f"model.vae_dir={folder!r} is no folder; speed can be measured with one, a DC-AE f32c32 or an SD-VAE id")
