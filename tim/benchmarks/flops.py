"""What a training step computes, part by part: counted on tensors without memory, so any size on any machine."""

import math
from typing import Any

import timm
import torch
import torch.nn.functional as nnf
from torch import nn

from tim.benchmarks.measure import Results, conditions, count_flops
from tim.benchmarks.sampling import ARCHITECTURES, load_encoder, load_vae
from tim.config import Config
from tim.models.network import build_network, traits_of
from tim.schedulers.derivative import difference_derivative, take_batch

GIGA = 1e9


def bench_flops(config: Config, batch_size: int, tokens: int) -> Results:
    """Floating-point operations of matrix products, convolutions and attention, two for each multiply-add.

    Args:
        batch_size: images, of which the config's `diffusion_ratio` need no derivative.
        tokens: of a caption; the empty one has one.

    Returns:
        `_gflop` an image of every part, whether the config uses it or not. `jvp` is the tangent that the forward pass carries,
        with the explicit softmax; `guidance` the passes of the moving average, with and without condition; the autoencoder
        encodes images that are not stored as latents, and decodes samples; `of_jvp_in_dde` is the ratio of the derivatives.
    """
    with torch.device("meta"):
        network = build_network(config.model.network)
        parts = network_flops(config, network, batch_size, tokens) | companion_flops(config, network, batch_size, tokens)
    step = parts["forward"] + parts["backward"]
    return {
        "what": "flops",
        "batch_size": batch_size,
        "latent": "x".join(map(str, traits_of(network).latent_shape())),
        "parameters": sum(p.numel() for p in network.parameters()),
        **{f"{name}_gflop": count / batch_size / GIGA for name, count in parts.items()},
        "step_dde_gflop": (step + parts["dde"]) / batch_size / GIGA,
        "step_jvp_gflop": (step + parts["jvp"]) / batch_size / GIGA,
        "of_jvp_in_dde": parts["jvp"] / parts["dde"],
    }


def network_flops(config: Config, network: nn.Module, batch_size: int, tokens: int) -> dict[str, int]:
    """The parts of a step that the network computes. Call it where tensors have no memory."""
    n, meta = round(getattr(config.model.build_objective(), "diffusion_ratio", 0) * batch_size), torch.device("meta")
    x, t = torch.randn(batch_size, *traits_of(network).latent_shape()), torch.rand(batch_size)
    cond, uncond = conditions(network, batch_size, meta, tokens)
    zs: dict[str, Any] = {"return_zs": True} if config.model.enc_dir else {}
    tail = take_batch(cond, n, batch_size)
    tangents = (x[n:], t[n:], torch.zeros_like(t[n:]))

    def train() -> None:
        outputs = network(x, t, t, **cond, **zs)
        sum((u.sum() for u in outputs), torch.zeros(())).backward()

    with torch.no_grad():
        forward = count_flops(lambda: network(x, t, t, **cond, **zs))
        transport = config.model.transport.build()
        dde = count_flops(lambda: difference_derivative(network, transport, x[n:], x[n:], t[n:], t[n:], tail, 0.005))
        jvp = count_flops(lambda: network(x, t, t, **cond, **zs, tangents=tangents)) - forward
        guidance = count_flops(lambda: network(x, t, t, **cond)) + count_flops(lambda: network(x, t, t, **uncond))
    return {"forward": forward, "backward": count_flops(train) - forward, "dde": dde, "jvp": jvp, "guidance": guidance}


@torch.no_grad()
def companion_flops(config: Config, network: nn.Module, batch_size: int, tokens: int) -> dict[str, int]:
    """What the frozen networks around it compute for as many images. Call it where tensors have no memory."""
    m, counts = config.model, {}
    channels, *sides = traits_of(network).latent_shape()
    latents = torch.randn(batch_size, channels, *sides)
    if m.vae_dir:
        vae = load_vae(m.vae_dir, torch.float32, torch.device("meta"))
        images = torch.randn(batch_size, 3, *(vae.factor * side for side in sides))
        counts["encode"] = count_flops(lambda: vae.encode(images))
        counts["decode"] = count_flops(lambda: vae.decode(latents))
    if m.enc_dir:
        patch = traits_of(network).patch_size
        counts["repa"] = radio_flops(batch_size, math.prod(side // patch for side in sides))
    if m.text_encoder_dir:
        encoder = load_encoder(m.text_encoder_dir, torch.float32, torch.device("meta"), tokens)
        ids = torch.zeros(batch_size, tokens, dtype=torch.int64)
        mask = torch.ones(batch_size, 1, tokens, tokens)  # of four axes, since the values of one with two would be read
        counts["text"] = count_flops(lambda: encoder.model(input_ids=ids, attention_mask=mask))
    return counts


def radio_flops(batch_size: int, features: int) -> int:
    """What RADIO computes for as many features of each image: its patches are embedded, and its blocks see a prefix too."""
    a = ARCHITECTURES["radio-v2.5-b"]
    blocks = timm.create_model(a["model"], pretrained=False).get_submodule("blocks")
    patches = torch.randn(batch_size, features, 3 * a["patch_size"] ** 2)
    tokens = torch.randn(batch_size, a["prefix_tokens"] + features, a["width"])
    return count_flops(lambda: (nnf.linear(patches, torch.randn(a["width"], patches.shape[-1])), blocks(tokens)))
