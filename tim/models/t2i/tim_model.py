"""The text-to-image TiM network."""

from typing import Any, cast

import torch
from torch import Tensor, nn

from tim.models.blocks import Block
from tim.models.embeddings import CaptionEmbedder
from tim.models.network import traits_of
from tim.models.trunk import TransitionTransformer


class TiM(TransitionTransformer):
    """Text-to-image network: c = T(t) + d, and every block attends to the caption.

    Takes the arguments of `TransitionTransformer` and

    Args:
        cap_feat_dim: width of the text encoder's features.
    """

    cross_attention = True

    def __init__(self, *args: Any, cap_feat_dim: int = 2048, **kwargs: Any) -> None:
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

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        r: Tensor,
        y: Tensor,
        attn_type: str | None = None,
        return_zs: bool = False,
        jvp: bool = False,
        y_mask: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """F(x_t, t, r, y).

        Args:
            x: state (B, C, H, W).
            t, r: c_noise of both times (B,), float32 or wider.
            y: caption features (B, M, cap_feat_dim), or what `caption_keys_values` made of them.
            attn_type, return_zs, jvp: see `TransitionTransformer.transform`.
            y_mask: (B, M) bool, True for real tokens, at least one a caption; None counts all.

        Returns:
            (B, C, H, W); with return_zs also the REPA projection (B, N, z_dim).

        Raises:
            ValueError: when y has another width than cap_feat_dim.
        """
        d = self.interval_embedding(t, r)
        c = self.t_embedder(t) + d
        y = self._embed_caption(y) if y.ndim == 3 else y
        return self.transform(x, c, d, y, y_mask, attn_type, return_zs, jvp)

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
        traits_of(self).check_caption_width(y.shape[-1])
        return self.y_embedder(y)
