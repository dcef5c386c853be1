"""The text-to-image TiM network."""

from typing import Any, cast

import torch
from torch import Tensor, nn

from tim.models.attention import CrossAttention
from tim.models.attention import SelfAttention as Attention
from tim.models.blocks import Block, FinalLayer
from tim.models.dual import Value
from tim.models.embeddings import CaptionEmbedder, TimestepEmbedder
from tim.models.network import traits_of
from tim.models.trunk import TransitionTransformer
from tim.typed_yaml import PositiveInt

# What experiments import from here.
__all__ = ["Attention", "CaptionEmbedder", "CrossAttention", "FinalLayer", "TiM", "TimestepEmbedder"]


class TiM(TransitionTransformer):
    """Text-to-image network: c = T(t) + d, and every block attends to the caption.

    Takes the arguments of `TransitionTransformer` and

    Args:
        cap_feat_dim: width of the text encoder's features.
    """

    cross_attention = True

    def __init__(self, *args: Any, cap_feat_dim: PositiveInt = 2048, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.cap_feat_dim = cap_feat_dim
        self.y_embedder = CaptionEmbedder(cap_feat_dim, self.hidden_size)
        self.initialize_weights()

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """As the trunk's, and small normal layers of the caption MLP."""
        super().initialize_weights()
        for layer in (self.y_embedder.mlp.fc1_g, self.y_embedder.mlp.fc1_x, self.y_embedder.mlp.fc2):
            nn.init.normal_(layer.weight, std=0.02)

    def condition(self, c: Value, y: Tensor) -> tuple[Value, Tensor]:
        """c as it is, and caption tokens.

        Args:
            y: caption features (B, M, cap_feat_dim), or what `caption_keys_values` made of them.

        Raises:
            ValueError: when y has another width than cap_feat_dim.
        """
        return c, self._embed_caption(y) if y.ndim == 3 else y

    def caption_keys_values(self, y: Tensor) -> Tensor:
        """All that the network computes from the caption alone, to be passed as `y` to every step of a sampling run.

        Args:
            y: caption features (B, M, cap_feat_dim).

        Returns:
            Cross-attention keys and values of every block (B, depth, 2, num_heads, M, head_dim).

        Raises:
            ValueError: when y has another width than cap_feat_dim.
        """
        y = self._embed_caption(y)
        return torch.stack([cast(Block, block).caption_keys_values(y) for block in self.blocks], dim=1)

    def _embed_caption(self, y: Tensor) -> Tensor:
        if y.shape[-1] != self.cap_feat_dim:  # compilers cannot follow what says so
            traits_of(self).check_caption_width(y.shape[-1])
        return self.y_embedder(y)
