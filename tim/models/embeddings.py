"""Embeddings of patches, times, class labels and captions."""

from typing import cast

import torch
from einops import rearrange
from torch import Tensor, nn

from tim.models.blocks import SwiGLU
from tim.models.dual import Dual, Value, each, linear, patches, silu, value_of


class PatchEmbed(nn.Module):
    """Patchify convolution: (B, C, H, W) -> row-major tokens (B, H W / patch_size², hidden_size)."""

    def __init__(self, patch_size: int, in_channels: int, hidden_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Value) -> Value:
        """(B, C, H, W) -> (B, N, hidden_size)."""
        return each(lambda a: rearrange(a, "b c h w -> b (h w) c"), patches(self.proj, x))


class TimestepEmbedder(nn.Module):
    """Sinusoidal features [cos | sin] of t * 10000^(-k/128), then Linear-SiLU-Linear.

    The time is not multiplied by 1000 first, as that of discrete steps is: dF/dt would grow by as much.
    """

    frequency_size = 256

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(self.frequency_size, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return next(self.mlp.parameters()).dtype

    def forward(self, t: Value) -> Value:
        """t (B,), any real values -> (B, hidden_size). The angles are float32 or wider, also under autocast."""
        inner, outer = cast(nn.Linear, self.mlp[0]), cast(nn.Linear, self.mlp[2])
        return linear(outer, silu(linear(inner, each(lambda a: a.to(self.dtype), self.features(t)))))

    def features(self, t: Value) -> Value:
        """[cos wt | sin wt] (B, frequency_size), whose tangent is [-w sin wt | w cos wt] t'."""
        half = self.frequency_size // 2
        # Half precision would round t itself, and neighbouring times to one.
        t = each(lambda a: a.to(torch.promote_types(a.dtype, torch.float32)), t)
        times = value_of(t)
        frequencies = 10000.0 ** (-torch.arange(half, device=times.device, dtype=times.dtype) / half)
        angles = times[:, None] * frequencies
        # cos first: the order is part of the released weights.
        value = torch.cat([angles.cos(), angles.sin()], dim=-1)
        if not isinstance(t, Dual):
            return value
        angles = t.tail[:, None] * frequencies
        turned = torch.cat([-angles.sin() * frequencies, angles.cos() * frequencies], dim=-1)
        return Dual(value, turned * t.tangent[:, None])


class LabelEmbedder(nn.Module):
    """Class-label table; with label dropout its last row, index num_classes, is the null class."""

    def __init__(self, num_classes: int, hidden_size: int, dropout_prob: float) -> None:
        super().__init__()
        # Without dropout nothing trains a null row, and released tables of such runs have none.
        self.embedding_table = nn.Embedding(num_classes + int(dropout_prob > 0), hidden_size)

    def forward(self, y: Tensor) -> Tensor:
        """y (B,) int -> (B, hidden_size)."""
        return self.embedding_table(y)


class CaptionEmbedder(nn.Module):
    """LayerNorm and SwiGLU from text features to the width of the network."""

    def __init__(self, cap_feat_dim: int, hidden_size: int) -> None:
        super().__init__()
        # Hidden states of language models have a few channels that are larger than the others by orders of magnitude.
        self.norm = nn.LayerNorm(cap_feat_dim)
        self.mlp = SwiGLU(cap_feat_dim, 4 * hidden_size, hidden_size)

    def forward(self, y: Tensor) -> Tensor:
        """y (B, M, cap_feat_dim) -> (B, M, hidden_size)."""
        return self.mlp(self.norm(y.to(self.norm.weight.dtype)))
