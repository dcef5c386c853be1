"""Small networks: golden weights, random weights, and how far two results differ."""

import json

import torch
from safetensors.torch import load_file

from helpers.paths import GOLDENS

TINY = dict(
    input_size=8,
    patch_size=2,
    in_channels=4,
    hidden_size=48,
    depth=2,
    num_heads=3,
    encoder_depth=1,
    z_dim=12,
    projector_dim=16,
    qk_norm=True,
    use_new_embed=True,
    distance_aware=True,
    lora_hidden_size=16,
)


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference relative to the largest value of b."""
    return ((a - b).abs().max() / b.abs().max()).item()


def load_golden(name: str):
    """(meta, tensors, network with the golden weights) of c2i_tiny or t2i_tiny."""
    from tim.models.c2i.tim_model import TiM as C2I
    from tim.models.t2i.tim_model import TiM as T2I

    meta = json.loads((GOLDENS / name / "meta.json").read_text())
    network = {"c2i": C2I, "t2i": T2I}[meta["kind"]](**meta["network"])
    network.load_state_dict(load_file(GOLDENS / name / "weights.safetensors"), strict=True)
    return meta, load_file(GOLDENS / name / "tensors.safetensors"), network


def randomize(network: torch.nn.Module, seed: int = 0, scale: float = 0.1) -> torch.nn.Module:
    """Fill every parameter with small normals, so that gates and output are not zero."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in network.parameters():
            p.copy_(torch.randn(p.shape, generator=g, dtype=torch.float32) * scale)
    return network
